"""Stages through ONNX Runtime."""

from __future__ import annotations

from ...bundle import Bundle
from ..backends import EngineOptions
from ..engine import Engine
from .loader import Device, load_session
from .runner import OnnxRuntimeEngine

__all__ = ["Device", "OnnxRuntimeEngine", "load_engines", "load_session"]


def load_engines(bundle: Bundle, options: EngineOptions) -> dict[str, Engine]:
    """A session per stage of `bundle`. Raises what `load_session` does."""
    device = Device.parse(options.device)
    engines: dict[str, Engine] = {}
    for stage in bundle.manifest.stages:
        name = stage.contract.name
        # Looking up embeddings is one copy: more threads would only wait for each other.
        threads = 1 if name == "embed_tokens" else options.threads
        session = load_session(bundle.graph(name), device, threads=threads, repeated=name == "llm")
        kv_cache = bundle.manifest.kv_cache if name == "llm" else None
        engines[name] = OnnxRuntimeEngine(stage.contract, session, device, kv_cache)
    return engines
