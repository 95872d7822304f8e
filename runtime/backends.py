"""The backends, by name: each a package whose `load_engines(bundle, options)` gives an engine per stage."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ..bundle import Bundle
from ..errors import InputError
from .engine import Engine

BACKENDS = {"onnxruntime": "onnxruntime", "openvino": "openvino", "torch": "torch"}


@dataclass(frozen=True)
class EngineOptions:
    """How engines run. `checkpoint`: the weights of the PyTorch backend; others take the bundle's."""

    device: str = "cpu"
    threads: int | None = None
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and (isinstance(self.threads, bool) or self.threads < 1):
            raise InputError(
                f"threads is {self.threads!r}; accepted is a whole number from 1 up, or None for all cores"
            )


def load_engines(name: str, bundle: Bundle, options: EngineOptions) -> dict[str, Engine]:
    """Engines of all stages of `bundle`. InputError for an unknown backend; else what that backend raises."""
    if name not in BACKENDS:
        raise InputError(f"engine {name!r} is unknown; known are {', '.join(BACKENDS)}")
    backend = import_module(f".{BACKENDS[name]}", __package__)
    engines: dict[str, Engine] = backend.load_engines(bundle, options)
    return engines
