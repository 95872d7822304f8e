"""Stages through ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...bundle import Bundle
from ...errors import EngineError
from ..backends import EngineOptions
from ..engine import Engine
from .concatenated import ConcatenatedEngine
from .loader import Device, load_session
from .runner import OnnxRuntimeEngine

if TYPE_CHECKING:
    from ..tensorrt.device import Device as SharedDevice

__all__ = ["ConcatenatedEngine", "Device", "OnnxRuntimeEngine", "load_engine", "load_engines", "load_session"]


def load_engines(bundle: Bundle, options: EngineOptions) -> dict[str, Engine]:
    """A session per stage of `bundle`; on a GPU they share memory and a stream. Raises what `load_session` does."""
    names = [stage.contract.name for stage in bundle.manifest.stages]
    device = Device.parse(options.device)
    memory = None
    if device.type != "cpu":
        from .cuda import shared_device

        memory = shared_device(device)
    engines: dict[str, Engine] = {}
    if memory is not None:
        memory.open()  # while they are made: what is left of a failure is freed too
    try:
        for name in names:
            engines[name] = _load_engine(bundle, name, options, memory)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    finally:
        if memory is not None:
            memory.close()
    return engines


def load_engine(bundle: Bundle, stage: str, options: EngineOptions) -> Engine:
    """A session for `stage` alone. Raises what `load_session` does, KeyError for a stage that is not there."""
    return _load_engine(bundle, stage, options, None)


def _load_engine(bundle: Bundle, stage: str, options: EngineOptions, memory: SharedDevice | None) -> Engine:
    """`memory`: of the GPU, shared with the engines of other stages; None: tensors pass through host memory."""
    device = Device.parse(options.device)
    # Looking up embeddings is one copy: more threads would only wait for each other.
    threads = 1 if stage == "embed_tokens" else options.threads
    record = bundle.manifest.stage(stage)
    fp8 = record.precision == "fp8"
    kv_cache = bundle.manifest.kv_cache if stage == "llm" else None
    # A cache that is not written in place is one that grows.
    grows = kv_cache is not None and not kv_cache.shared_buffer
    settings: dict[str, Any] = {"threads": threads, "repeated": stage == "llm", "fp8": fp8}
    if memory is None or grows:
        session = load_session(bundle.graph(stage), device, **settings)
        engine = ConcatenatedEngine if grows else OnnxRuntimeEngine
        return engine(record.contract, session, device, kv_cache)
    from .cuda import CudaEngine, stream_options

    # Only the steps of a generation run again and again at one shape.
    graphs = options.cuda_graphs and stage in ("embed_tokens", "llm")
    providers = device.providers_with(stream_options(memory, graphs=graphs))
    try:
        session = load_session(bundle.graph(stage), device, providers=providers, **settings)
    except EngineError as error:
        if graphs:
            raise EngineError(
                f"{error}, or load it without cuda_graphs, which every node must run on CUDA for"
            ) from error
        raise
    return CudaEngine(record.contract, session, device, memory, kv_cache, graphs=graphs)
