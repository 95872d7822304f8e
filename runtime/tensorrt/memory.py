"""CUDA's runtime through cuda-python: memory, copies, streams, events and graphs, errors raised instead of returned.

The only module here that names a function of CUDA. `cuda.bindings.runtime` is where cuda-python has it from 12.6.1 on,
`cuda.cudart` before (what a JetPack 6 board may have); functions and results are the same.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ...errors import DependencyError, EngineError

_MODULES = ("cuda.bindings.runtime", "cuda.cudart")
_INSTALL = "`pip install cuda-python` (on a board with CUDA 12: `pip install 'cuda-python<13'`)"


class Cuda:
    """The calls that the engines need. Streams, events, graphs and memory are integers, as TensorRT takes them."""

    def __init__(self, module: Any) -> None:
        self._cudart = module

    # Memory

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the device, aligned to 256. EngineError says how much is free when it fails."""
        status, address = self._cudart.cudaMalloc(size)
        if self._name(status) == "cudaErrorMemoryAllocation":
            self._forget_error()
            free, total = self.memory()
            raise EngineError(
                f"the device has no {size / 2**20:,.1f} MiB left ({free / 2**20:,.0f} of {total / 2**20:,.0f} MiB are "
                "free); close other engines, build with smaller maxima (--profile) or with --weight-streaming"
            )
        self._check(status, "cudaMalloc")
        return int(address)

    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int) -> int:
        """Address of `size` bytes of page-locked host memory, from and to which copies run asynchronously."""
        return int(self._call("cudaMallocHost", size))

    def free_pinned(self, address: int) -> None:
        """Give back what `allocate_pinned` gave."""
        self._call("cudaFreeHost", address)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""
        status, free, total = self._cudart.cudaMemGetInfo()
        self._check(status, "cudaMemGetInfo")
        return int(free), int(total)

    def copy(self, target: int, source: int, size: int, direction: str, stream: int) -> None:
        """Enqueue a copy of `size` bytes; `direction`: "HostToDevice", "DeviceToHost" or "DeviceToDevice"."""
        if size:
            kind = getattr(self._cudart.cudaMemcpyKind, f"cudaMemcpy{direction}")
            self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    # Streams and events

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""
        return int(self._call("cudaStreamCreateWithFlags", self._cudart.cudaStreamNonBlocking))

    def synchronize(self, stream: int) -> None:
        """Wait until all that was enqueued is done. EngineError with what went wrong on the device since."""
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        """End a stream."""
        self._call("cudaStreamDestroy", stream)

    def create_event(self) -> int:
        """An event that takes the time."""
        return int(self._call("cudaEventCreate"))

    def record_event(self, event: int, stream: int) -> None:
        """Enqueue taking the time."""
        self._call("cudaEventRecord", event, stream)

    def elapsed(self, start: int, end: int) -> float:
        """Milliseconds between two events that have happened."""
        return float(self._call("cudaEventElapsedTime", start, end))

    def destroy_event(self, event: int) -> None:
        """End an event."""
        self._call("cudaEventDestroy", event)

    # Graphs

    def begin_capture(self, stream: int) -> None:
        """From here what this thread enqueues on `stream` is recorded and not run."""
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """An executable graph of what was recorded. EngineError when something in it cannot be captured."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def abandon_capture(self, stream: int) -> None:
        """End a capture whose recording failed, and forget the error."""
        status, graph = self._cudart.cudaStreamEndCapture(stream)
        if int(status) == 0 and int(graph) != 0:
            self._call("cudaGraphDestroy", graph)
        self._forget_error()

    def launch_graph(self, graph: int, stream: int) -> None:
        """Enqueue a graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """End an executable graph."""
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, function: str, *arguments: Any) -> Any:
        """The one result beside the status, None where there is none."""
        try:
            status, *results = getattr(self._cudart, function)(*arguments)
        except RuntimeError as error:  # `cuda.cudart` without a driver: "Failed to dlopen libcuda.so.1"
            raise EngineError(f"CUDA: {function} failed ({error}); see `bridgeport doctor`") from error
        self._check(status, function)
        return results[0] if results else None

    def _check(self, status: Any, function: str) -> None:
        if int(status) != 0:
            self._forget_error()
            raise EngineError(f"CUDA: {function} failed with {self._name(status)}; see `bridgeport doctor`")

    def _forget_error(self) -> None:
        """TensorRT asks for the last error behind its kernels, and would report this one as theirs."""
        self._cudart.cudaGetLastError()

    def _name(self, status: Any) -> str:
        _, name = self._cudart.cudaGetErrorName(status)
        return name.decode() if isinstance(name, bytes) else str(name)


def load_cuda() -> Cuda:
    """CUDA's runtime. DependencyError where cuda-python is missing or does not load."""
    errors: list[str] = []
    for name in _MODULES:
        try:
            return Cuda(import_module(name))
        except (ImportError, OSError) as error:
            errors.append(str(error))
    raise DependencyError(f"running TensorRT engines needs cuda-python ({errors[0]}); {_INSTALL}")
