"""What an export can be asked for, and what it needs installed: answered before anything heavy is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

from ..errors import DependencyError, InputError, UnsupportedError
from ..manifest import Manifest, StageRecord

PRECISIONS = get_args(StageRecord.model_fields["precision"].annotation)
TARGETS = get_args(Manifest.model_fields["target"].annotation)
_PRECISIONS_NOW = ("fp32", "int4")
_TARGETS_NOW = ("cpu",)
# What an exported graph depends on; their versions go into the manifest.
LIBRARIES = (
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-genai",
    "polygraphy",
)
_ALSO_NEEDED = ("onnx-graphsurgeon", "safetensors")


def check_options(precision: str, target: str, calibration: str | Path | None) -> None:
    """Raise InputError for an unknown precision or target, UnsupportedError for one that comes later."""
    for what, got, known, now in (
        ("precision", precision, PRECISIONS, _PRECISIONS_NOW),
        ("target", target, TARGETS, _TARGETS_NOW),
    ):
        if got not in known:
            raise InputError(f"{what} {got!r} is unknown; accepted are {', '.join(now)}")
        if got not in now:
            raise UnsupportedError(f"{what} {got} is not built yet; accepted now are {', '.join(now)}")
    if calibration is not None:
        raise UnsupportedError(
            f"precision {precision} needs no calibration data; leave --calibration {calibration} out (INT8, which "
            "needs it, is not built yet)"
        )


def check_libraries() -> None:
    """Raise DependencyError with the libraries that an export needs and that are not installed."""
    missing = [name for name in (*LIBRARIES, *_ALSO_NEEDED) if _version(name) is None]
    if missing:
        raise DependencyError(
            f"exporting needs {', '.join(missing)}, not installed here; run `pip install 'bridgeport[export,cpu]'` "
            "with Python 3.11 or newer"
        )


def toolchain() -> dict[str, str]:
    """Name -> version of what made a graph."""
    return {name: found for name in LIBRARIES if (found := _version(name)) is not None}


def _version(name: str) -> str | None:
    # ONNX Runtime's GPU build is another distribution of the same package.
    for distribution in (name, "onnxruntime-gpu") if name == "onnxruntime" else (name,):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None
