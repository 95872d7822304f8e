"""Stages through ONNX Runtime."""

from __future__ import annotations

from ...bundle import Bundle
from ..backends import EngineOptions
from ..engine import Engine
from .concatenated import ConcatenatedEngine
from .loader import Device, load_session
from .runner import OnnxRuntimeEngine

__all__ = ["ConcatenatedEngine", "Device", "OnnxRuntimeEngine", "load_engine", "load_engines", "load_session"]


def load_engines(bundle: Bundle, options: EngineOptions) -> dict[str, Engine]:
    """A session per stage of `bundle`. Raises what `load_session` does."""
    names = [stage.contract.name for stage in bundle.manifest.stages]
    return {name: load_engine(bundle, name, options) for name in names}


def load_engine(bundle: Bundle, stage: str, options: EngineOptions) -> Engine:
    """A session for `stage` alone. Raises what `load_session` does, KeyError for a stage that is not there."""
    device = Device.parse(options.device)
    # Looking up embeddings is one copy: more threads would only wait for each other.
    threads = 1 if stage == "embed_tokens" else options.threads
    record = bundle.manifest.stage(stage)
    fp8 = record.precision == "fp8"
    session = load_session(bundle.graph(stage), device, threads=threads, repeated=stage == "llm", fp8=fp8)
    kv_cache = bundle.manifest.kv_cache if stage == "llm" else None
    # A cache that is not written in place is one that grows.
    engine = OnnxRuntimeEngine if kv_cache is None or kv_cache.shared_buffer else ConcatenatedEngine
    return engine(record.contract, session, device, kv_cache)
