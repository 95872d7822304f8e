"""Stages through OpenVINO, where it can read them; the others through ONNX Runtime."""

from __future__ import annotations

import logging

from ...bundle import Bundle
from ...errors import InputError
from ..backends import EngineOptions
from ..engine import Engine
from .loader import compile_graph, import_openvino, why_unreadable
from .runner import OpenVinoEngine

__all__ = ["OpenVinoEngine", "load_engine", "load_engines", "why_not"]

logger = logging.getLogger(__name__)

# Schemes whose INT8 operators are ONNX Runtime's own. OpenVINO reads most of them, and computes them in float.
_ONNXRUNTIME_SCHEMES = frozenset({"dynamic-s8", "dynamic-s8-attention", "static-u8s8", "static-u8s8-attention"})


def load_engines(bundle: Bundle, options: EngineOptions) -> dict[str, Engine]:
    """An engine per stage of `bundle`. Raises DependencyError without OpenVINO, and what the loaders do."""
    names = [stage.contract.name for stage in bundle.manifest.stages]
    return {name: load_engine(bundle, name, options) for name in names}


def load_engine(bundle: Bundle, stage: str, options: EngineOptions) -> Engine:
    """The engine of `stage` alone: ONNX Runtime's, with a line in the log, where `why_not` has a reason."""
    if options.device != "cpu":
        raise InputError(f"device {options.device!r}: the openvino engine runs on cpu; use the engine onnxruntime")
    reason = why_not(bundle, stage)
    if reason is not None:
        from ..onnxruntime import load_engine as load_onnxruntime_engine

        logger.info("%s runs on ONNX Runtime: %s", stage, reason)
        return load_onnxruntime_engine(bundle, stage, options)
    compiled = compile_graph(bundle.graph(stage), threads=1 if stage == "embed_tokens" else options.threads)
    return OpenVinoEngine(bundle.manifest.stage(stage).contract, compiled)


def why_not(bundle: Bundle, stage: str) -> str | None:
    """Why OpenVINO does not run `stage`, None when it does."""
    import_openvino()
    if stage == "llm" and bundle.manifest.kv_cache is not None:
        return "its key/value cache is shared with the graph, which OpenVINO cannot do"
    quantization = bundle.manifest.stage(stage).quantization
    if quantization is not None and quantization.scheme in _ONNXRUNTIME_SCHEMES:
        return f"{quantization.scheme} is made of ONNX Runtime's own INT8 operators"
    return why_unreadable(bundle.graph(stage))
