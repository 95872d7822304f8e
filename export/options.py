"""What an export can be asked for, and what it needs installed: answered before anything heavy is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

from ..errors import DependencyError, InputError
from ..manifest import Precision, Target

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
TARGETS: tuple[Target, ...] = get_args(Target)
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
    """Raise InputError for an unknown precision or target, and for calibration data that is missing or not needed."""
    for what, got, known in (("precision", precision, PRECISIONS), ("target", target, TARGETS)):
        if got not in known:
            raise InputError(f"{what} {got!r} is unknown; accepted are {', '.join(known)}")
    if needs_calibration(precision, target) and calibration is None:
        raise InputError(
            f"precision {precision} for {target} needs pictures to calibrate and to judge with; add --calibration DIR"
        )
    if not needs_calibration(precision, target) and calibration is not None:
        raise InputError(
            f"precision {precision} for {target} needs no calibration data; leave --calibration {calibration} out"
        )


def needs_calibration(precision: str, target: str) -> bool:
    """Whether an export goes on to quantise: all but FP32, and 4-bit weights in blocks, for the CPU."""
    return target != "cpu" or precision not in ("fp32", "int4")


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
