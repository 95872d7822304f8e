"""A language model whose cache grows by concatenation, the cache in device memory.

Two buffers for each layer and kind: a run reads past from one and writes present, which is past and the new tokens
behind it, to the other, and they change places. The mask's rule is that of `onnxruntime/concatenated.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ...errors import EngineError
from ...models.contract import TensorSpec
from ..engine import Arrays, Call
from ..kv_cache import KvCache
from ..onnxruntime.concatenated import ConcatenatedCache
from .device import Block
from .runner import TensorRtEngine, Tensors


@dataclass
class _Blocks:
    """Per cache tensor the block that holds the past and the one that the present goes to."""

    past: list[Block] = field(default_factory=list)
    present: list[Block] = field(default_factory=list)

    def swap(self) -> None:
        """The present becomes the past."""
        self.past, self.present = self.present, self.past


@dataclass(frozen=True)
class DeviceCache(ConcatenatedCache):
    """A cache of up to `capacity` places per row, padding included, on the device."""

    blocks: _Blocks = field(default_factory=_Blocks)

    def start(self, batch: int) -> None:
        """Empty, for `batch` new prompts."""
        self.places.held = np.zeros((batch, 0), np.int64)

    def tensors(self, batch: int, tokens: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """(name, shape, address) of every past and present when `tokens` are added to what is held."""
        contract, held = self.contract, self.places.held.shape[1]
        for slot, (present, past) in enumerate(self.names().items()):
            shape = (batch, contract.num_heads, held, contract.head_size)
            longer = (batch, contract.num_heads, held + tokens, contract.head_size)
            yield past, shape, self.blocks.past[slot].address
            yield present, longer, self.blocks.present[slot].address


class ConcatenatedTensorRtEngine(TensorRtEngine):
    """`llm` with the cache as inputs and outputs. A call whose mask is as wide as its tokens are many is a prefill."""

    def allocate_cache(self, batch: int, capacity: int) -> KvCache:
        if self.kv_cache is None:
            return super().allocate_cache(batch, capacity)
        cache = DeviceCache(self.kv_cache, batch, capacity, ())
        size = int(np.prod(cache.shape(batch))) * np.dtype(self.kv_cache.dtype).itemsize
        count = len(cache.names())
        cache.blocks.past = [self._device.block(size) for _ in range(count)]
        cache.blocks.present = [self._device.block(size) for _ in range(count)]
        return cache

    def _bind(self, inputs: Arrays, outputs: Arrays, cache: KvCache | None) -> Call:
        self._check_open()
        self._check_device(inputs)
        self._check_device(outputs)
        if not isinstance(cache, DeviceCache):
            raise EngineError(f"{self.contract.name}: the cache is of another engine; make one with allocate_cache")
        mask, tokens = inputs["attention_mask"], inputs["inputs_embeds"].shape[1]

        def call() -> None:
            if mask.shape[1] == tokens:
                cache.start(len(mask))
            places = cache.mask(mask.sum(1), tokens)
            if places.shape[1] > cache.capacity:
                raise EngineError(
                    f"{self.contract.name}: {places.shape[1]} places with the padding came, the cache holds "
                    f"{cache.capacity}; allocate a larger one"
                )
            extra: Tensors = {name: (shape, at) for name, shape, at in cache.tensors(len(mask), tokens)}
            with self._device.lock:
                self._run({**inputs, "attention_mask": places}, outputs, extra)
            cache.places.held = places
            cache.blocks.swap()

        return call

    def _graph_inputs(self) -> list[TensorSpec]:
        return [*super()._graph_inputs(), *self._cache_specs(past=True)]

    def _graph_outputs(self) -> list[TensorSpec]:
        return [*super()._graph_outputs(), *self._cache_specs(past=False)]

    def _cache_specs(self, *, past: bool) -> list[TensorSpec]:
        contract = self.kv_cache
        if contract is None:
            return []
        names = DeviceCache(contract, 0, 0, ()).names()
        shape = ("batch", contract.num_heads, "past_sequence" if past else "total_sequence", contract.head_size)
        return [
            TensorSpec(name=name, dtype=contract.dtype, shape=shape) for name in (names.values() if past else names)
        ]
