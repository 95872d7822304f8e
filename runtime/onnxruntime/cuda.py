"""Stages on ONNX Runtime's CUDA provider whose tensors stay on the GPU from stage to stage.

All sessions compute on one stream, which is also that of the copies between them. ONNX Runtime waits for it at the end
of each run, and is left to: nodes that it puts on the CPU have memory that the next run may take. With graphs, what
runs again at the same shapes and over the same cache is captured once and replayed.
"""

from __future__ import annotations

import logging
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DependencyError, EngineError
from ...models.contract import KvCacheContract, StageContract
from ..engine import Arrays, Call
from ..kv_cache import KvCache
from ..tensorrt.device import Device as SharedDevice
from ..tensorrt.memory import load_cuda
from .loader import Device, first_line, import_onnxruntime
from .runner import OnnxRuntimeEngine

logger = logging.getLogger(__name__)

# ONNX Runtime keeps a captured graph as long as its session.
MOST_GRAPHS = 8
_NO_GRAPH = -1  # onnxruntime_run_options_config_keys.h: no capture and no replay in this run; 0 is reserved

Key = tuple[tuple[str, tuple[int, ...], int], ...]


def shared_device(device: Device) -> SharedDevice | None:
    """The memory and stream that all sessions of a bundle share. None on the CPU, on a GPU that is not the first one,
    and without cuda-python: tensors then pass through host memory. None too where CUDA does not start, since the
    session says better what is missing.
    """
    if device.type != "cuda" or device.index != 0:
        return None
    try:
        return SharedDevice(load_cuda())
    except (DependencyError, EngineError) as error:
        logger.info("tensors pass through host memory: %s", error)
        return None


def stream_options(memory: SharedDevice, *, graphs: bool) -> dict[str, str]:
    """The CUDA provider's options that put a session on the stream of `memory`."""
    options = {"user_compute_stream": str(memory.stream)}
    return options | ({"enable_cuda_graph": "1"} if graphs else {})


class _Bound:
    """The tensors of a call at addresses that do not change, and what the host copies there and back.

    `graph`: the id that a captured graph has in its session.
    """

    def __init__(self, session: Any, memory: SharedDevice, place: tuple[str, int]) -> None:
        self.binding = session.io_binding()
        self.graph = _NO_GRAPH
        self._memory = memory
        self._place = place
        self._tensors: dict[str, Any] = {}  # those of the device, kept alive
        self._key: list[tuple[str, tuple[int, ...], int]] = []

    @property
    def key(self) -> Key:
        """What a captured graph is made for: the shapes, and where the cache is."""
        return tuple(self._key)

    def bind(self, name: str, array: NDArray[Any], *, output: bool) -> None:
        """`array` where it lies on the device, or a place there that a host array is copied to or from."""
        host = isinstance(array, np.ndarray)
        there: Any = self._memory.empty(array.shape, str(array.dtype)) if host else array
        self._tensors[name] = there
        self._key.append((name, tuple(array.shape), 0))
        self.bind_address(name, array.dtype, tuple(array.shape), there.address, output=output)

    def bind_address(self, name: str, dtype: Any, shape: tuple[int, ...], address: int, *, output: bool) -> None:
        """A tensor on the device at `address`."""
        bind = self.binding.bind_output if output else self.binding.bind_input
        bind(name, *self._place, dtype, shape, address)

    def bind_cache(self, cache: KvCache, batch: int) -> None:
        """Past and present of every layer, at one address each."""
        dtype, shape = np.dtype(cache.contract.dtype), cache.shape(batch)
        for past, present, buffer in cache.bindings():
            self._key.append((past, shape, buffer.address))
            self.bind_address(past, dtype, shape, buffer.address, output=False)
            self.bind_address(present, dtype, shape, buffer.address, output=True)

    def upload(self, inputs: Arrays) -> None:
        """Copy what of `inputs` is elsewhere, and wait until host arrays may change again."""
        waits = False
        for name, array in inputs.items():
            target, source, host = self._tensors[name].address, _address(array), isinstance(array, np.ndarray)
            if source != target:
                self._copy(target, source, array.nbytes, "HostToDevice" if host else "DeviceToDevice")
                waits |= host
        if waits:
            self._memory.synchronize()

    def download(self, outputs: Arrays) -> None:
        """Copy to those of `outputs` that are elsewhere, and wait for host arrays."""
        waits = False
        for name, array in outputs.items():
            source, target, host = self._tensors[name].address, _address(array), isinstance(array, np.ndarray)
            if source != target:
                self._copy(target, source, array.nbytes, "DeviceToHost" if host else "DeviceToDevice")
                waits |= host
        if waits:
            self._memory.synchronize()

    def _copy(self, target: int, source: int, size: int, way: str) -> None:
        self._memory.cuda.copy(target, source, size, way, self._memory.stream)


def _address(array: Any) -> int:
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.address)


class CudaEngine(OnnxRuntimeEngine):
    """A session on the stream of `memory`. A call reads and writes arrays of the device where they lie; `graphs`: from
    its second run on a bound call is captured and replayed.
    """

    def __init__(
        self,
        contract: StageContract,
        session: Any,
        device: Device,
        memory: SharedDevice,
        kv_cache: KvCacheContract | None = None,
        *,
        graphs: bool = False,
    ) -> None:
        super().__init__(contract, session, device, kv_cache)
        self.memory = memory
        self._shared = memory
        self._graphs: dict[Key, _Bound] | None = {} if graphs else None
        self._ids = count(1)
        memory.open()

    def allocate_cache(self, batch: int, capacity: int) -> KvCache:
        if self.kv_cache is None:
            return super().allocate_cache(batch, capacity)
        return KvCache.allocate(
            self.kv_cache, batch, capacity, lambda shape, dtype: self._shared.upload(np.zeros(shape, dtype))
        )

    def close(self) -> None:
        if self._session is None:
            return
        super().close()
        if self._graphs:
            self._graphs.clear()
        self._shared.close()

    def _bind(self, inputs: Arrays, outputs: Arrays, cache: KvCache | None) -> Call:
        self._check_open()
        bound = _Bound(self._session, self._shared, (self._device.type, self._device.index))
        for name, array in inputs.items():
            bound.bind(name, array, output=False)
        for spec in self.contract.outputs:
            bound.bind(spec.name, outputs[spec.name], output=True)
        if cache is not None:
            bound.bind_cache(cache, len(next(iter(inputs.values()))))
        runs = count()
        keep = (inputs, outputs, cache)  # bound by address: they must live as long as the call

        def call(_keep: object = keep) -> None:
            # The first run finds workspaces and tactics; a graph could not.
            once_more = next(runs) > 0
            self._run(self._fixed(bound) if once_more else bound, inputs, outputs)

        return call

    def _fixed(self, bound: _Bound) -> _Bound:
        """What holds the graph for these shapes and this cache: that of an earlier generation, or `bound` from now on.

        A graph reads and writes the arrays that it was captured over; those of later calls are copied.
        """
        if self._graphs is None:
            return bound
        if bound.key not in self._graphs and len(self._graphs) < MOST_GRAPHS:
            bound.graph = next(self._ids)
            self._graphs[bound.key] = bound
        return self._graphs.get(bound.key, bound)

    def _check_open(self) -> None:
        if self._session is None:
            raise EngineError(f"{self.contract.name}: the engine is closed; load the bundle again")

    def _run(self, bound: _Bound, inputs: Arrays, outputs: Arrays) -> None:
        self._check_open()
        options = None
        if self._graphs is not None:
            options = import_onnxruntime().RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(bound.graph))
        with self._shared.lock:
            bound.upload(inputs)
            try:
                self._session.run_with_iobinding(bound.binding, options)
            except self._errors as error:
                raise EngineError(f"{self.contract.name}: ONNX Runtime failed: {first_line(error)}") from error
            bound.download(outputs)
