"""What the engines of one bundle share on a GPU: a stream, memory, and arrays that stay there from stage to stage."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import EngineError
from .memory import Cuda

logger = logging.getLogger(__name__)

_ALIGNMENT = 256  # what cudaMalloc gives; sizes are rounded up to it, and no block is empty


class Block:
    """Device memory that goes back to `device` when nobody refers to it any more."""

    def __init__(self, device: Device, address: int, size: int) -> None:
        self.device, self.address, self.size = device, address, size

    def __del__(self) -> None:
        self.device.recycle(self.address, self.size)


class Device:
    """One stream for all engines of a bundle, so that what they enqueue runs in the order of their calls.

    Memory that is given back is handed out again without a wait: whoever writes to it next does so on the same stream,
    later. `lock` is held for a call: contexts and staging buffers serve one at a time. Whatever else goes on the stream
    takes it too, since a copy that comes while a call is captured would become a part of its graph.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self._stream = cuda.create_stream()
        self.lock = threading.RLock()
        self._spare: dict[int, list[int]] = {}
        self._activations: Block | None = None
        self._users = 0
        self._closed = False

    @property
    def stream(self) -> int:
        """Its handle. EngineError once all engines are closed: CUDA does not check a handle that is gone."""
        if self._closed:
            raise EngineError("the pipeline of this array or call is closed; copy arrays with np.asarray before that")
        return self._stream

    def block(self, size: int) -> Block:
        """At least `size` bytes, with whatever was in them. EngineError when the device's memory is used up."""
        rounded = max(1, -(-size // _ALIGNMENT)) * _ALIGNMENT
        try:
            address = self._spare[rounded].pop()
        except (KeyError, IndexError):
            address = self._allocate(rounded)
        return Block(self, address, rounded)

    def recycle(self, address: int, size: int) -> None:
        """Keep the memory of a block that is gone for the next one of its size."""
        if self._closed:
            with on_closing():
                self.cuda.free(address)
        else:
            self._spare.setdefault(size, []).append(address)

    def share_activations(self, size: int) -> Block:
        """The block in which all contexts compute, one after the other; call it with the largest size first."""
        if self._activations is None or self._activations.size < size:
            self._activations = self.block(size)
        return self._activations

    def synchronize(self) -> None:
        """Wait for the stream. EngineError with what went wrong on it."""
        with self.lock:
            self.cuda.synchronize(self.stream)

    def open(self) -> None:
        """One more engine computes here."""
        self._users += 1

    def close(self) -> None:
        """One engine less; the last one frees the stream and the memory."""
        self._users -= 1
        if self._users > 0 or self._closed:
            return
        with self.lock, on_closing():
            self._free_spare()
        self._closed, self._activations = True, None
        with on_closing():
            self.cuda.destroy_stream(self._stream)

    def _allocate(self, size: int) -> int:
        with self.lock:  # no allocation while a call is captured
            try:
                return self.cuda.allocate(size)
            except EngineError:
                if not any(self._spare.values()):
                    raise
                self._free_spare()  # blocks of other sizes may make room
                return self.cuda.allocate(size)

    def _free_spare(self) -> None:
        self.synchronize()
        spare, self._spare = self._spare, {}
        for addresses in spare.values():
            for address in addresses:
                self.cuda.free(address)

    # Arrays

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """A new array with whatever was in its memory."""
        kind: np.dtype[Any] = np.dtype(dtype)
        return DeviceArray(self.block(_count(shape) * kind.itemsize), 0, tuple(shape), kind)

    def concatenate(self, arrays: Sequence[DeviceArray]) -> DeviceArray:
        """Along the first axis, without a copy where they lie one after the other in one block."""
        first = arrays[0]
        if all(before.block is after.block and before.end == after.address for before, after in pairwise(arrays)):
            shape = (sum(len(array) for array in arrays), *first.shape[1:])
            return DeviceArray(first.block, first.offset, shape, first.dtype)
        whole = self.empty((sum(len(array) for array in arrays), *first.shape[1:]), str(first.dtype))
        at = whole.address
        with self.lock:
            for array in arrays:
                self.cuda.copy(at, array.address, array.nbytes, "DeviceToDevice", self.stream)
                at += array.nbytes
        return whole

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """A copy of a host array; waits until it is there."""
        host = np.ascontiguousarray(array)
        target = self.empty(host.shape, str(host.dtype))
        with self.lock:
            self.cuda.copy(target.address, host.ctypes.data, host.nbytes, "HostToDevice", self.stream)
            self.synchronize()
        return target

    def take(self, source: DeviceArray, rows: NDArray[np.int64]) -> DeviceArray:
        """`source[rows]`; the source itself where the rows are all of it in their order."""
        if len(rows) == len(source) and np.array_equal(rows, np.arange(len(source))):
            return source
        target = self.empty((len(rows), *source.shape[1:]), str(source.dtype))
        self._copy_rows(target, np.arange(len(rows)), source, rows)
        return target

    def put(self, target: DeviceArray, rows: NDArray[np.int64], source: DeviceArray | NDArray[Any]) -> None:
        """`target[rows] = source`; a source on the host, or one of another type, is copied first.

        EngineError when its rows have another shape than those of `target`.
        """
        if source.shape[1:] != target.shape[1:]:
            raise EngineError(
                f"rows of shape {list(source.shape[1:])} came for an array with rows of {list(target.shape[1:])}; the "
                "stages of this bundle do not fit, export it again"
            )
        if isinstance(source, np.ndarray) or source.dtype != target.dtype:
            source = self.upload(np.asarray(source).astype(target.dtype, copy=False))
        self._copy_rows(target, rows, source, np.arange(len(source)))

    def _copy_rows(
        self, target: DeviceArray, target_rows: NDArray[np.int64], source: DeviceArray, source_rows: NDArray[np.int64]
    ) -> None:
        """One copy for each run of rows that follow each other on both sides: image tokens are mostly one run."""
        if not len(target_rows):
            return
        jumps = np.flatnonzero((np.diff(target_rows) != 1) | (np.diff(source_rows) != 1)) + 1
        row = source.nbytes // max(1, len(source))
        with self.lock:
            for start, end in zip([0, *jumps], [*jumps, len(target_rows)], strict=True):
                to = target.address + int(target_rows[start]) * row
                come = source.address + int(source_rows[start]) * row
                self.cuda.copy(to, come, int(end - start) * row, "DeviceToDevice", self.stream)


@dataclass(frozen=True)
class _Flags:
    c_contiguous: bool = True


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """An array on the GPU, C-contiguous; it holds its memory. `np.asarray` of it waits for the stream and copies."""

    block: Block
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    flags: _Flags = _Flags()

    @property
    def address(self) -> int:
        """Of the first element, on the device."""
        return self.block.address + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return _count(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Address behind the last element."""
        return self.address + self.nbytes

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice) -> DeviceArray:
        """A view: one place of the first axis, or a slice of it without a step."""
        row = self.nbytes // max(1, len(self))
        if not isinstance(key, slice):
            return DeviceArray(self.block, self.offset + range(len(self))[key] * row, self.shape[1:], self.dtype)
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise IndexError(f"slices of an array on the device have no step, got {step}; copy it with np.asarray")
        shape = (max(0, stop - start), *self.shape[1:])
        return DeviceArray(self.block, self.offset + start * row, shape, self.dtype)

    def reshape(self, *shape: int) -> DeviceArray:
        """A view of another shape; one axis may be -1."""
        shape = np.empty(self.shape, np.bool_).reshape(shape).shape if _count(self.shape) else shape
        return DeviceArray(self.block, self.offset, shape, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        device, host = self.block.device, np.empty(self.shape, self.dtype)
        with device.lock:
            device.cuda.copy(host.ctypes.data, self.address, self.nbytes, "DeviceToHost", device.stream)
            device.synchronize()
        return host if dtype is None else host.astype(dtype)


class Staging:
    """Memory of one tensor of one engine, on the device and page-locked on the host; it grows and never shrinks."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._block: Block | None = None
        self._pinned: tuple[int, int] = (0, 0)

    def device_address(self, size: int) -> int:
        """At least `size` bytes on the device; never a null pointer, which TensorRT refuses for empty tensors too."""
        if self._block is None or self._block.size < size:
            self._block = None  # its memory goes before the new one's comes
            self._block = self._device.block(size)
        return self._block.address

    def host_array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A view of page-locked memory, valid until a larger one is asked for."""
        size = max(1, _count(shape) * dtype.itemsize)
        if self._pinned[1] < size:
            self._free_pinned()
            self._pinned = (self._device.cuda.allocate_pinned(size), size)
        memory = (ctypes.c_char * size).from_address(self._pinned[0])
        return np.frombuffer(memoryview(memory), dtype, _count(shape)).reshape(shape)

    def close(self) -> None:
        """Free both."""
        self._block = None
        self._free_pinned()

    def _free_pinned(self) -> None:
        address, self._pinned = self._pinned[0], (0, 0)
        if address:
            self._device.synchronize()  # a copy from it may still be on its way
            self._device.cuda.free_pinned(address)


@contextmanager
def on_closing() -> Iterator[None]:
    """What cannot be freed, since the device failed, ends with the process: the failure itself was told before."""
    try:
        yield
    except EngineError as error:
        logger.warning("not freed: %s", error)


def _count(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))
