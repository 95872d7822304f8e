"""A language model whose cache grows by concatenation, behind the interface of one that is written in place.

The graph gives `present` = `past` and the new tokens behind it, so all rows grow by one place at every step, and the
padding of prompts of different length stays between. The callers' mask says how long each row is; the graph's says
which places hold a token (see `export/passes/standard_decoder.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import EngineError
from ..engine import Arrays, Call
from ..kv_cache import KvCache
from .loader import first_line
from .runner import OnnxRuntimeEngine


@dataclass
class _Places:
    """`held` int64 `[B, P]`: 1 for a place with a token. `past`: name -> `[B, heads, P, size]`."""

    held: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    past: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class ConcatenatedCache(KvCache):
    """Arrays that every call replaces by longer ones; `capacity` bounds the rows' lengths as in any other cache."""

    places: _Places = field(default_factory=_Places)

    def start(self, batch: int) -> None:
        """Empty, for `batch` new prompts."""
        empty = np.zeros((batch, self.contract.num_heads, 0, self.contract.head_size), self.contract.dtype)
        self.places.held = np.zeros((batch, 0), np.int64)
        self.places.past = dict.fromkeys(self.names().values(), empty)

    def names(self) -> dict[str, str]:
        """Present name -> past name."""
        slots = [(layer, kind) for layer in range(self.contract.num_layers) for kind in ("key", "value")]
        past, present = self.contract.past, self.contract.present
        return {present.format(layer=i, kind=kind): past.format(layer=i, kind=kind) for i, kind in slots}

    def mask(self, lengths: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
        """The graph's mask `[B, P + tokens]` when rows are `lengths` long with what is new of their `tokens`."""
        held = self.places.held
        fresh = np.arange(tokens)[None] < (lengths - held.sum(1))[:, None]
        return np.concatenate([held, fresh.astype(np.int64)], axis=1)


class ConcatenatedEngine(OnnxRuntimeEngine):
    """`llm` for a bundle whose cache contract has no shared buffer. A call whose mask is as wide as its tokens are many
    is a prefill and begins anew.
    """

    def allocate_cache(self, batch: int, capacity: int) -> KvCache:
        if self.kv_cache is None:
            return super().allocate_cache(batch, capacity)
        return ConcatenatedCache(self.kv_cache, batch, capacity, ())

    def _bind(self, inputs: Arrays, outputs: Arrays, cache: KvCache | None) -> Call:
        if self._session is None:
            raise EngineError(f"{self.contract.name}: the engine is closed; load the bundle again")
        if not isinstance(cache, ConcatenatedCache):
            raise EngineError(f"{self.contract.name}: the cache is of another engine; make one with allocate_cache")
        session, mask, tokens = self._session, inputs["attention_mask"], inputs["inputs_embeds"].shape[1]
        names = [output.name for output in session.get_outputs()]
        renamed = cache.names()

        def call() -> None:
            if mask.shape[1] == tokens:
                cache.start(len(mask))
            places = cache.mask(mask.sum(1), tokens)
            try:
                found = session.run(names, {**inputs, **cache.places.past, "attention_mask": places})
            except self._errors as error:
                raise EngineError(f"{self.contract.name}: ONNX Runtime failed: {first_line(error)}") from error
            values = dict(zip(names, found, strict=True))
            cache.places.held = places
            cache.places.past = {past: values[present] for present, past in renamed.items()}
            for name, array in outputs.items():
                array[...] = values[name]

        return call
