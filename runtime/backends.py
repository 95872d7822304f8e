"""The backends, by name: each a module whose `load_engines(bundle, options)` gives an engine per stage."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ..bundle import Bundle
from ..errors import InputError
from ..speed_hint import log_speed_warnings
from .engine import Engine

BACKENDS = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-tensorrt": "onnxruntime.tensorrt_provider",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "torch": "torch",
    "torch-tensorrt": "torch_tensorrt",
}


@dataclass(frozen=True)
class EngineOptions:
    """How engines run. `checkpoint`: the weights of the PyTorch backends; others take the bundle's. `cuda_graphs`: ONNX
    Runtime on a GPU captures what runs again at the same shapes, and replays it.
    """

    device: str = "cpu"
    threads: int | None = None
    checkpoint: Path | None = None
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and (isinstance(self.threads, bool) or self.threads < 1):
            raise InputError(
                f"threads is {self.threads!r}; accepted is a whole number from 1 up, or None for all cores"
            )
        if self.cuda_graphs and self.device.startswith("cpu"):
            raise InputError("CUDA graphs need a GPU and the device is cpu; give the device cuda, or leave them out")


def default_backend(bundle: Bundle) -> str:
    """TensorRT for a bundle whose stages were built to its engines, ONNX Runtime for any other."""
    return "tensorrt" if all(stage.format == "tensorrt" for stage in bundle.manifest.stages) else "onnxruntime"


def load_engines(name: str | None, bundle: Bundle, options: EngineOptions) -> dict[str, Engine]:
    """Engines of all stages of `bundle`; a line is logged for each that was made for another processor.

    `name`: None for the bundle's own. InputError for an unknown backend; else what that backend raises.
    """
    name = name or default_backend(bundle)
    if name not in BACKENDS:
        raise InputError(f"engine {name!r} is unknown; known are {', '.join(BACKENDS)}")
    log_speed_warnings(bundle.manifest)
    backend = import_module(f".{BACKENDS[name]}", __package__)
    engines: dict[str, Engine] = backend.load_engines(bundle, options)
    return engines
