"""Stages through TensorRT engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import EngineError, InputError

if TYPE_CHECKING:
    from ...bundle import Bundle
    from ..backends import EngineOptions
    from ..engine import Engine
    from .api import Api
    from .device import Device
    from .loader import LoadedEngine
    from .memory import Cuda

__all__ = ["load_engines"]


def load_engines(bundle: Bundle, options: EngineOptions) -> dict[str, Engine]:
    """An engine per stage of `bundle`, all on one stream and with their activations in one block of memory.

    Raises DependencyError without TensorRT, cuda-python or a driver that is new enough, UnsupportedError without a
    GPU, EngineError for an engine of another machine or one that does not load: nothing is deserialised before all
    stages were compared with this machine.
    """
    from .api import load_api
    from .loader import check_machine, find_local_machine, try_plan
    from .memory import load_cuda

    _check_device(options.device)
    api = load_api()
    machine = find_local_machine(api)  # before a runtime is made
    for stage in bundle.manifest.stages:
        check_machine(bundle, stage, machine)
    cuda = load_cuda()
    for stage in bundle.manifest.stages:
        try_plan(bundle, stage, machine)
    return _load_all(bundle, api, cuda)


def _load_all(bundle: Bundle, api: Api, cuda: Cuda) -> dict[str, Engine]:
    from .device import Device
    from .loader import load_plan

    loaded = {stage.contract.name: load_plan(bundle, stage, api) for stage in bundle.manifest.stages}
    device = Device(cuda)
    device.open()  # while they are made: what is left of a failure is freed too
    engines: dict[str, Engine] = {}
    try:
        # The largest first: every later context fits in its block.
        device.share_activations(max(api.device_memory_size(one.engine) for one in loaded.values()))
        for name, one in loaded.items():
            engines[name] = _make_engine(bundle, name, api, one, device)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    finally:
        device.close()
    return engines


def _make_engine(bundle: Bundle, name: str, api: Api, loaded: LoadedEngine, device: Device) -> Engine:
    from .concatenated import ConcatenatedTensorRtEngine
    from .runner import TensorRtEngine

    contract, names = bundle.manifest.stage(name).contract, [one.name for one in loaded.record.profiles]
    cache = bundle.manifest.kv_cache if name == "llm" else None
    if cache is None:
        return TensorRtEngine(contract, api, loaded, device, profile_names=names)
    if cache.shared_buffer:
        raise EngineError(
            f"{bundle.path}: the cache of llm is written in place, which no TensorRT engine does; build it again"
        )
    # Its shapes change at every step, so no run is like the one before.
    return ConcatenatedTensorRtEngine(contract, api, loaded, device, profile_names=names, kv_cache=cache, graphs=False)


def _check_device(device: str) -> None:
    """Engines run on the first GPU that CUDA shows; "cpu" is what the option has when it was not given."""
    if device not in ("cpu", "cuda", "cuda:0"):
        raise InputError(
            f"device {device!r}: a TensorRT engine runs on the first GPU; choose one with CUDA_VISIBLE_DEVICES=N"
        )
