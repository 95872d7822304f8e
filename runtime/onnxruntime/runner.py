"""A stage as an ONNX Runtime session, every tensor bound by its address."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import EngineError
from ...models.contract import KvCacheContract, StageContract
from ..engine import Arrays, Call, Engine
from ..kv_cache import Buffer, KvCache
from .loader import Device, first_line, import_onnxruntime, onnxruntime_errors


class DeviceBuffer:
    """A cache buffer in the memory of an accelerator."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @property
    def address(self) -> int:
        """Address of the first byte, on the device."""
        return int(self.value.data_ptr())


class OnnxRuntimeEngine(Engine):
    """An `InferenceSession` on `device`, whose tensors are those of `contract` (and of `kv_cache`)."""

    def __init__(
        self, contract: StageContract, session: Any, device: Device, kv_cache: KvCacheContract | None = None
    ) -> None:
        super().__init__(contract, kv_cache)
        self._session = session
        self._device = device
        self._errors = onnxruntime_errors()
        self._check_names()

    def allocate_cache(self, batch: int, capacity: int) -> KvCache:
        if self.kv_cache is None or self._device.type == "cpu":
            return super().allocate_cache(batch, capacity)
        return KvCache.allocate(self.kv_cache, batch, capacity, self._device_buffer)

    def close(self) -> None:
        self._session = None

    def _bind(self, inputs: Arrays, outputs: Arrays, cache: KvCache | None) -> Call:
        if self._session is None:
            raise EngineError(f"{self.contract.name}: the engine is closed; load the bundle again")
        session, errors, stage = self._session, self._errors, self.contract.name
        binding = session.io_binding()
        self._bind_inputs(binding, inputs)
        for spec in self.contract.outputs:
            array = outputs[spec.name]
            binding.bind_output(spec.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        if cache is not None:
            self._bind_cache(binding, cache, len(next(iter(inputs.values()))))
        on_host = self._device.type == "cpu"
        keep = (inputs, outputs, cache)  # bound by address: the arrays must live as long as the call

        def call(_keep: object = keep) -> None:
            if not on_host:
                self._bind_inputs(binding, inputs)  # copied to the device when they are bound
            try:
                session.run_with_iobinding(binding)
                if not on_host:
                    binding.synchronize_outputs()
            except errors as error:
                raise EngineError(f"{stage}: ONNX Runtime failed: {first_line(error)}") from error

        return call

    def _bind_inputs(self, binding: Any, inputs: Arrays) -> None:
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_cache(self, binding: Any, cache: KvCache, batch: int) -> None:
        place, dtype, shape = (
            (self._device.type, self._device.index),
            np.dtype(cache.contract.dtype),
            cache.shape(batch),
        )
        for past, present, buffer in cache.bindings():
            binding.bind_input(past, *place, dtype, shape, buffer.address)
            binding.bind_output(present, *place, dtype, shape, buffer.address)

    def _device_buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        zeros = np.zeros(shape, dtype)
        ort = import_onnxruntime()
        return DeviceBuffer(ort.OrtValue.ortvalue_from_numpy(zeros, self._device.type, self._device.index))

    def _check_names(self) -> None:
        """The graph's tensors must be the contract's: a manifest beside a foreign graph is caught here."""
        cache = list(KvCache.allocate(self.kv_cache, 0, 0).bindings()) if self.kv_cache is not None else []
        expected = (
            {spec.name for spec in self.contract.inputs} | {past for past, _, _ in cache},
            {spec.name for spec in self.contract.outputs} | {present for _, present, _ in cache},
        )
        found = (
            {node.name for node in self._session.get_inputs()},
            {node.name for node in self._session.get_outputs()},
        )
        for kind, want, have in zip(("inputs", "outputs"), expected, found, strict=True):
            if want != have:
                odd = ", ".join(sorted(want ^ have))
                raise EngineError(
                    f"{self.contract.name}: the graph's {kind} are not those of the manifest ({odd}); "
                    "export the bundle again"
                )
