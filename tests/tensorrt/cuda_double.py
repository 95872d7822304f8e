"""A double of `cuda.bindings.runtime`: device memory is host memory, streams run late, graphs record and replay.

It is a double: it shows that copies, streams, events and graphs are used as documented, nothing about a GPU.

What a stream is given runs when the stream is synchronised, not before: an output that is read without a wait holds
the poison that new memory is filled with, and page-locked memory that is written to before its copy ran gives wrong
inputs. Functions have the names, arguments and results `(status, ...)` of the genuine module; `test_engine_cuda.py`
compares them with it where it is installed.
"""

# ruff: noqa: N802, N815 - the genuine names
from __future__ import annotations

import ctypes
import enum
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

POISON = 0xFF  # NaN as a float, -1 as an integer
COMPUTE_MS, COPY_MS = 2.0, 0.5
Work = Callable[[], None]


class CudaError(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class MemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class CaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


OK = CudaError.cudaSuccess


@dataclass
class CudaDouble:
    """The state behind the module. `calls`: names in their order. `limit`: bytes of the device. `broken`: every call
    fails from now on, as on a device after an illegal access. `last`: what `cudaGetLastError` would tell.
    """

    limit: int = 1 << 30
    refuse_capture: bool = False
    broken: bool = False
    last: CudaError = OK
    calls: list[str] = field(default_factory=list)
    copies: list[tuple[str, int]] = field(default_factory=list)
    device: dict[int, Any] = field(default_factory=dict)
    pinned: dict[int, Any] = field(default_factory=dict)
    streams: dict[int, list[Work]] = field(default_factory=dict)
    captures: dict[int, list[Work]] = field(default_factory=dict)
    graphs: dict[int, list[Work]] = field(default_factory=dict)
    events: dict[int, float | None] = field(default_factory=dict)
    invalidated: bool = False
    clock: float = 0.0
    _handles: int = 0x1000

    def handle(self) -> int:
        self._handles += 0x10
        return self._handles

    def enqueue(self, stream: int, work: Work) -> None:
        """What `execute_async_v3` and the copies do: into the capture, or to the end of the stream."""
        if stream in self.captures:
            if self.refuse_capture:
                self.invalidated = True
            self.captures[stream].append(work)
        else:
            self.streams[stream].append(work)

    def compute(self, stream: int, work: Work) -> None:
        """For `TensorRtDouble.on_enqueue`."""

        def timed() -> None:
            work()
            self.clock += COMPUTE_MS

        self.enqueue(stream, timed)

    def run(self) -> None:
        for queue in self.streams.values():
            while queue:
                queue.pop(0)()

    def check(self, address: int, size: int, name: str) -> None:
        """For `TensorRtDouble.check_memory`: all of a tensor must lie in one allocation of the device."""
        if not any(start <= address and address + size <= start + len(block) for start, block in self.device.items()):
            raise AssertionError(f"{name}: {size} bytes at {address:#x} are not memory of the device")

    def left(self) -> dict[str, Any]:
        """What was made and not given back, by kind; empty when all was."""
        kinds = ("device", "pinned", "streams", "graphs", "events")
        return {kind: list(getattr(self, kind)) for kind in kinds if getattr(self, kind)}

    def used(self) -> int:
        return sum(len(block) for block in self.device.values())


def install_cuda_double(monkeypatch: pytest.MonkeyPatch, double: Any = None, **knobs: Any) -> CudaDouble:
    """Put it into `sys.modules["cuda.bindings.runtime"]`, and a TensorRT double's work on its streams."""
    state = CudaDouble(**knobs)
    module = ModuleType("cuda.bindings.runtime")
    for name, function in vars(Functions(state)).items():
        setattr(module, name, _recorded(state, name, function))
    module.cudaError_t = CudaError  # type: ignore[attr-defined]
    module.cudaMemcpyKind = MemcpyKind  # type: ignore[attr-defined]
    module.cudaStreamCaptureMode = CaptureMode  # type: ignore[attr-defined]
    module.cudaStreamNonBlocking = 1  # type: ignore[attr-defined]
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", module)
    if double is not None:
        double.on_enqueue, double.check_memory = state.compute, state.check
    return state


def _recorded(state: CudaDouble, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        state.calls.append(name)
        asks = name in ("cudaGetErrorName", "cudaGetLastError")
        results = (CudaError.cudaErrorIllegalAddress, None) if state.broken and not asks else function(*arguments)
        if results[0] != OK:
            state.last = results[0]
        return results

    return call


class Functions:
    """The functions, each made over the state: attributes, so that `vars` lists them."""

    def __init__(self, state: CudaDouble) -> None:
        for name in dir(type(self)):
            if name.startswith("cuda"):
                setattr(self, name, getattr(type(self), name).__get__(state))

    def cudaMalloc(self: Any, size: int) -> Any:
        if self.used() + size > self.limit:
            return CudaError.cudaErrorMemoryAllocation, None
        # Aligned to 256 as the genuine one: some bytes more, and the start moved.
        address, block = _aligned(size)
        self.device[address] = block
        return OK, address

    def cudaFree(self: Any, address: int) -> Any:
        self.run()
        if address not in self.device:
            return (CudaError.cudaErrorInvalidValue,)
        block = self.device.pop(address)
        ctypes.memset(address, POISON, len(block))
        return (OK,)

    def cudaMallocHost(self: Any, size: int) -> Any:
        address, block = _aligned(size)
        self.pinned[address] = block
        return OK, address

    def cudaFreeHost(self: Any, address: int) -> Any:
        return (OK if self.pinned.pop(address, None) is not None else CudaError.cudaErrorInvalidValue,)

    def cudaMemGetInfo(self: Any) -> Any:
        return OK, self.limit - self.used(), self.limit

    def cudaMemcpyAsync(self: Any, target: int, source: int, size: int, kind: Any, stream: int) -> Any:
        to, come = kind != MemcpyKind.cudaMemcpyDeviceToHost, kind != MemcpyKind.cudaMemcpyHostToDevice

        def work() -> None:
            if to:
                self.check(target, size, f"target of {kind.name}")
            if come:
                self.check(source, size, f"source of {kind.name}")
            ctypes.memmove(target, source, size)
            self.clock += COPY_MS

        self.copies.append((kind.name.removeprefix("cudaMemcpy"), size))
        self.enqueue(stream, work)
        return (OK,)

    def cudaStreamCreateWithFlags(self: Any, flags: int) -> Any:
        if flags != 1:
            return CudaError.cudaErrorInvalidValue, None
        stream = self.handle()
        self.streams[stream] = []
        return OK, stream

    def cudaStreamSynchronize(self: Any, stream: int) -> Any:
        if stream in self.captures:
            self.invalidated = True
            return (CudaError.cudaErrorStreamCaptureUnsupported,)
        while self.streams[stream]:
            self.streams[stream].pop(0)()
        return (OK,)

    def cudaStreamDestroy(self: Any, stream: int) -> Any:
        return (OK if self.streams.pop(stream, None) is not None else CudaError.cudaErrorInvalidValue,)

    def cudaEventCreate(self: Any) -> Any:
        event = self.handle()
        self.events[event] = None
        return OK, event

    def cudaEventRecord(self: Any, event: int, stream: int) -> Any:
        self.events[event] = None
        self.enqueue(stream, lambda: self.events.__setitem__(event, self.clock))
        return (OK,)

    def cudaEventElapsedTime(self: Any, start: int, end: int) -> Any:
        before, after = self.events[start], self.events[end]
        if before is None or after is None:
            return CudaError.cudaErrorNotReady, None
        return OK, after - before

    def cudaEventDestroy(self: Any, event: int) -> Any:
        del self.events[event]
        return (OK,)

    def cudaStreamBeginCapture(self: Any, stream: int, mode: Any) -> Any:
        self.captures[stream], self.invalidated = [], False
        return (OK,)

    def cudaStreamEndCapture(self: Any, stream: int) -> Any:
        work = self.captures.pop(stream)
        if self.invalidated:
            return CudaError.cudaErrorStreamCaptureInvalidated, None
        graph = self.handle()
        self.graphs[graph] = work
        return OK, graph

    def cudaGraphInstantiate(self: Any, graph: int, flags: int) -> Any:
        made = self.handle()
        self.graphs[made] = self.graphs[graph]
        return OK, made

    def cudaGraphLaunch(self: Any, graph: int, stream: int) -> Any:
        for work in self.graphs[graph]:
            self.enqueue(stream, work)
        return (OK,)

    def cudaGraphDestroy(self: Any, graph: int) -> Any:
        del self.graphs[graph]
        return (OK,)

    def cudaGraphExecDestroy(self: Any, graph: int) -> Any:
        del self.graphs[graph]
        return (OK,)

    def cudaGetErrorName(self: Any, error: Any) -> Any:
        return OK, CudaError(error).name.encode()

    def cudaGetLastError(self: Any) -> Any:
        self.last = OK
        return (OK,)


class _Memory:
    """Bytes that live as long as this does."""

    def __init__(self, size: int) -> None:
        self._buffer = ctypes.create_string_buffer(size + 256)
        self.address = (ctypes.addressof(self._buffer) + 255) // 256 * 256
        self._size = size
        ctypes.memset(self.address, POISON, size)

    def __len__(self) -> int:
        return self._size


def _aligned(size: int) -> tuple[int, _Memory]:
    memory = _Memory(size)
    return memory.address, memory
