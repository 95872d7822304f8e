"""ONNX files to compiled OpenVINO models."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import DependencyError, EngineError


def import_openvino() -> Any:
    """The module `openvino`; DependencyError says how to install it."""
    try:
        import openvino
    except ImportError as error:
        raise DependencyError(
            f"the engine openvino needs openvino ({error}); install it with `pip install 'bridgeport[openvino]'`, or "
            "use the engine onnxruntime"
        ) from error
    return openvino


@lru_cache(maxsize=1)
def _core() -> Any:
    return import_openvino().Core()


def why_unreadable(file: Path) -> str | None:
    """Why OpenVINO cannot read the graph `file`, None when it can."""
    try:
        _core().read_model(str(file))
    except RuntimeError as error:
        return f"OpenVINO does not read it ({reason_of(error)})"
    return None


def compile_graph(file: Path, *, threads: int | None = None, precision: str = "f32") -> Any:
    """A compiled model of the graph `file`. `threads`: None for all cores. `precision`: in which float operators
    compute, "f32" or "bf16" (OpenVINO's own default, on processors that have it, is not what FP32 promises).

    Raises DependencyError without OpenVINO, EngineError when the graph does not load.
    """
    import_openvino()
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        return _core().compile_model(str(file), "CPU", settings)
    except RuntimeError as error:
        raise EngineError(
            f"{file} does not load in OpenVINO: {reason_of(error)}; use the engine onnxruntime"
        ) from error


def reason_of(error: RuntimeError) -> str:
    """The line of an OpenVINO message that says what is wrong: the last one that is not about its own source."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return said[0] if said else "no message"
