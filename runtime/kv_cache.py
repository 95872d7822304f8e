"""The decoder's key/value cache: allocated once, bound to past and present, written in place by the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..models.contract import KvCacheContract

_KINDS = ("key", "value")
_GRANULE = 64  # a capacity is a multiple of this, so that prompts of similar length reuse one cache


class Buffer(Protocol):
    """Memory of one cache tensor, on whatever device the engine computes."""

    @property
    def address(self) -> int:
        """Address of the first byte."""


@dataclass(frozen=True)
class HostBuffer:
    """A buffer in host memory: `array` `[batch, num_heads, capacity, head_size]`."""

    array: NDArray[Any]

    @property
    def address(self) -> int:
        """Address of the first byte."""
        return int(self.array.ctypes.data)


@dataclass(frozen=True)
class KvCache:
    """One buffer per layer and kind, `[batch, num_heads, capacity, head_size]`; the cache owns them.

    Rows beyond a sequence's length hold what was left there: the graph reads no further than each row's
    length.
    """

    contract: KvCacheContract
    batch: int
    capacity: int
    buffers: tuple[Buffer, ...]

    @classmethod
    def allocate(
        cls,
        contract: KvCacheContract,
        batch: int,
        capacity: int,
        buffer: Callable[[tuple[int, ...], str], Buffer] | None = None,
    ) -> KvCache:
        """Buffers for `batch` rows of up to `capacity` tokens; `buffer(shape, dtype)` makes one."""
        make = buffer or host_buffer
        shape = (batch, contract.num_heads, capacity, contract.head_size)
        count = contract.num_layers * len(_KINDS)
        return cls(contract, batch, capacity, tuple(make(shape, contract.dtype) for _ in range(count)))

    def bindings(self) -> Iterator[tuple[str, str, Buffer]]:
        """(past name, present name, buffer) per layer and kind."""
        slots = ((layer, kind) for layer in range(self.contract.num_layers) for kind in _KINDS)
        for (layer, kind), buffer in zip(slots, self.buffers, strict=True):
            past = self.contract.past.format(layer=layer, kind=kind)
            yield past, self.contract.present.format(layer=layer, kind=kind), buffer

    def holds(self, batch: int, length: int) -> bool:
        """Whether `batch` rows of `length` tokens fit."""
        return batch <= self.batch and length <= self.capacity

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        """Shape of a buffer's first `batch` rows, which stand at its start."""
        return batch, self.contract.num_heads, self.capacity, self.contract.head_size


def host_buffer(shape: tuple[int, ...], dtype: str) -> HostBuffer:
    """A zeroed buffer in host memory."""
    return HostBuffer(np.zeros(shape, dtype))


def capacity_for(length: int, context_length: int) -> int:
    """Tokens to allocate for sequences of up to `length`: rounded up, within the context."""
    return min(context_length, -(-length // _GRANULE) * _GRANULE)
