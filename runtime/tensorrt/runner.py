"""A stage as a TensorRT engine, fed from host arrays or from arrays that another stage left on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from ...errors import EngineError
from ...models.contract import KvCacheContract, StageContract, TensorSpec
from ..engine import Arrays, Call, Engine
from ..kv_cache import KvCache
from .api import Api
from .context import Context
from .device import Device, DeviceArray, Staging, on_closing
from .latency import Latency, Stopwatch
from .loader import LoadedEngine

# Input or output -> its shape and address.
Tensors = dict[str, tuple[tuple[int, ...], int]]
# Target, source and bytes of a copy to the device.
Copy = tuple[int, int, int]


class TensorRtEngine(Engine):
    """An execution context on `device`, whose tensors are those of `contract` (and of `kv_cache`).

    Host arrays go through page-locked memory; an array of the device is read and written where it lies. A call that
    writes to host arrays waits for the device, one that writes to the device's does not.
    """

    def __init__(
        self,
        contract: StageContract,
        api: Api,
        loaded: LoadedEngine,
        device: Device,
        *,
        profile_names: Sequence[str] = (),
        kv_cache: KvCacheContract | None = None,
        graphs: bool = True,
    ) -> None:
        super().__init__(contract, kv_cache)
        axes = {spec.name: spec.shape for spec in self._graph_inputs()}
        self._context: Context | None = Context(
            api, loaded.engine, device, stage=contract.name, axes=axes, profile_names=profile_names, graphs=graphs
        )
        self._loaded: LoadedEngine | None = loaded
        self.memory = device
        self._device = device
        self._staging: dict[str, Staging] = {}
        self._uploading = False  # a copy from page-locked memory may still be on its way
        self._stopwatch: Stopwatch | None = None
        device.open()
        self._check_tensors(self._context)

    @property
    def replays(self) -> bool:
        """Whether the next run is a CUDA graph's."""
        return self._context is not None and self._context.graph.captured

    def close(self) -> None:
        if self._context is None:
            return
        with self._device.lock:
            context, self._context = self._context, None
            with on_closing():
                self._device.synchronize()
                self.time_runs(False)
            context.close()
            self._loaded = None
            for staging in self._staging.values():
                with on_closing():
                    staging.close()
            self._staging.clear()
            self._device.close()

    def time_runs(self, wanted: bool = True) -> None:
        """Take the time of every run from now on, or no more; each then waits for the device."""
        if self._stopwatch is not None:
            self._stopwatch.close()
        self._stopwatch = Stopwatch(self._device) if wanted else None

    def latencies(self) -> list[Latency]:
        """Of the runs since `time_runs`, taken out."""
        if self._stopwatch is None:
            return []
        runs, self._stopwatch.runs = self._stopwatch.runs, []
        return runs

    def _bind(self, inputs: Arrays, outputs: Arrays, cache: KvCache | None) -> Call:
        self._check_open()
        self._check_device(inputs)
        self._check_device(outputs)

        def call(_keep: object = (inputs, outputs)) -> None:
            with self._device.lock:
                self._run(inputs, outputs)

        return call

    def _check_device(self, arrays: Arrays) -> None:
        for name, array in arrays.items():
            if isinstance(array, DeviceArray) and array.block.device is not self._device:
                raise EngineError(
                    f"{self.contract.name}: {name} is an array of another pipeline's device; pass np.asarray of it"
                )

    def _check_open(self) -> Context:
        if self._context is None:
            raise EngineError(f"{self.contract.name}: the engine is closed; load the bundle again")
        return self._context

    def _run(self, inputs: Arrays, outputs: Arrays, extra: Tensors | None = None) -> None:
        """`extra`: further inputs and outputs, on the device."""
        context, watch = self._check_open(), self._stopwatch
        tensors, copies = self._stage(context, inputs)
        tensors |= {**(extra or {}), **{name: self._place(name, array) for name, array in outputs.items()}}
        context.prepare(tensors)
        # From here to the last mark the host enqueues and does nothing else: its time would count as the device's.
        if watch is not None:
            watch.mark(0)
        for target, source, size in copies:
            self._device.cuda.copy(target, source, size, "HostToDevice", self._device.stream)
        if watch is not None:
            watch.mark(1)
        context.enqueue()
        if watch is not None:
            watch.mark(2)
        pinned = self._download(context, outputs)
        if watch is not None:
            watch.mark(3)
        if pinned or watch is not None:
            self._device.synchronize()
            self._uploading = False
        for name, array in pinned.items():
            outputs[name][...] = array
        if watch is not None:
            watch.read()

    def _stage(self, context: Context, inputs: Arrays) -> tuple[Tensors, list[Copy]]:
        """Where every input is, and the copies that bring those of the host there from page-locked memory."""
        if self._uploading:
            self._device.synchronize()
        found: Tensors = {}
        copies: list[Copy] = []
        for name, array in inputs.items():
            on_host = context.tensors[name].location == "host"
            if isinstance(array, DeviceArray) and not on_host:
                found[name] = (array.shape, array.address)
                continue
            staging = self._staging_of(name)
            pinned = staging.host_array(array.shape, array.dtype)
            pinned[...] = array
            self._uploading = True  # also for a tensor in host memory, which the run itself reads
            if on_host:
                found[name] = (array.shape, pinned.ctypes.data)
                continue
            address = staging.device_address(array.nbytes)
            found[name] = (array.shape, address)
            copies.append((address, pinned.ctypes.data, array.nbytes))
        return found, copies

    def _place(self, name: str, array: NDArray[Any]) -> tuple[tuple[int, ...], int]:
        """Where the device writes an output; page-locked memory for its way to the host is there then too."""
        if isinstance(array, DeviceArray):
            return array.shape, array.address
        staging = self._staging_of(name)
        staging.host_array(array.shape, array.dtype)
        return array.shape, staging.device_address(array.nbytes)

    def _download(self, context: Context, outputs: Arrays) -> Arrays:
        """Enqueue the copies of what does not lie where it is wanted. Page-locked memory of those for the host."""
        if any(context.dynamic_output(name) for name in outputs):
            self._device.synchronize()  # their shapes are known then
        pinned: dict[str, NDArray[Any]] = {}
        for name, array in outputs.items():
            source, way = self._source(context, name, array), "DeviceToDevice"
            if isinstance(array, DeviceArray):
                target = array.address
            else:
                pinned[name] = self._staging_of(name).host_array(array.shape, array.dtype)
                target, way = pinned[name].ctypes.data, "DeviceToHost"
            if target != source:
                self._device.cuda.copy(target, source, array.nbytes, way, self._device.stream)
        return pinned

    def _source(self, context: Context, name: str, array: NDArray[Any]) -> int:
        """Where an output is. EngineError when its size depends on data and came to another shape."""
        dynamic = context.dynamic_output(name)
        if dynamic is None:
            return self._place(name, array)[1]
        if dynamic.shape != array.shape or dynamic.block is None:
            raise EngineError(
                f"{self.contract.name}: {name} came to {list(dynamic.shape)}, the contract says {list(array.shape)}"
            )
        return dynamic.block.address

    def _staging_of(self, name: str) -> Staging:
        if name not in self._staging:
            self._staging[name] = Staging(self._device)
        return self._staging[name]

    def _graph_inputs(self) -> list[TensorSpec]:
        return list(self.contract.inputs)

    def _graph_outputs(self) -> list[TensorSpec]:
        return list(self.contract.outputs)

    def _check_tensors(self, context: Context) -> None:
        """Names and types must be the contract's: a plan of another graph is caught here."""
        for mode, specs in (("input", self._graph_inputs()), ("output", self._graph_outputs())):
            found = {name: info.dtype for name, info in context.tensors.items() if info.mode == mode}
            wanted: Mapping[str, str] = {spec.name: spec.dtype for spec in specs}
            odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            if odd:
                name = odd[0]
                self.close()
                raise EngineError(
                    f"{self.contract.name}: {mode} {name!r} is {found.get(name, 'missing')} in the engine and "
                    f"{wanted.get(name, 'missing')} in the manifest; build the bundle again"
                )
