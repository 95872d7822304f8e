"""The language model step by step: one prefill of a batch of prompts, then one token per row and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .engine import Call, Engine
from .kv_cache import KvCache, capacity_for


class StepInputs(Protocol):
    """Inputs of `llm` beyond embeddings, mask and logits position, by name: say positions that pictures shift."""

    def prefill(self) -> Mapping[str, NDArray[Any]]:
        """For the prompts."""

    def step(self) -> Mapping[str, NDArray[Any]]:
        """For every later step: bound once, so they are the same arrays each time."""

    def advance(self, lengths: NDArray[np.int64]) -> None:
        """Write what the next step reads into the arrays of `step`: with its token a row is `lengths` `[B]` long."""


class Decoder:
    """The engines `embed_tokens` and `llm`, and a cache that successive generations reuse while it fits."""

    def __init__(self, embed_tokens: Engine, llm: Engine, context_length: int) -> None:
        self.embed_tokens = embed_tokens
        self.llm = llm
        self.context_length = context_length
        self._spare: list[KvCache] = []

    def embed(
        self, rows: Sequence[NDArray[np.int64]], *, resident: bool = False
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Token ids per row to `inputs_embeds` `[B, S, D]`, right-padded, and the rows' lengths `[B]`.

        `resident`: leave the embeddings in the engine's memory.
        """
        lengths = np.array([len(row) for row in rows], np.int64)
        input_ids = np.zeros((len(rows), int(lengths.max())), np.int64)
        for ids, row in zip(input_ids, rows, strict=True):
            ids[: len(row)] = row
        return self.embed_tokens.run({"input_ids": input_ids}, resident=resident)["inputs_embeds"], lengths

    def start(
        self,
        inputs_embeds: NDArray[Any],
        lengths: NDArray[np.int64],
        max_new_tokens: int,
        more: StepInputs | None = None,
    ) -> Decoding:
        """Prefill `inputs_embeds` `[B, S, D]`, rows right-padded; the cache has room for the new tokens.

        `more`: what else the language model's contract asks for.
        """
        batch = len(lengths)
        cache = self._take_cache(batch, int(lengths.max()) + max_new_tokens)
        return Decoding(self, cache, inputs_embeds, lengths, more)

    def give_back(self, cache: KvCache) -> None:
        """Keep `cache` for the next generation, unless a larger one is kept already."""
        if not self._spare or cache.holds(self._spare[-1].batch, self._spare[-1].capacity):
            self._spare[:] = [cache]

    def close(self) -> None:
        """Drop the cache that is kept."""
        self._spare.clear()

    def _take_cache(self, batch: int, length: int) -> KvCache:
        spare = self._spare.pop() if self._spare else None
        if spare is not None and spare.holds(batch, length):
            return spare
        del spare  # its memory goes before the new cache's comes
        return self.llm.allocate_cache(batch, capacity_for(length, self.context_length))


class Decoding:
    """One batch on its way. `logits` `[B, V]` are those of each row's newest token; every step overwrites
    them.

    All arrays of a step are allocated and bound once, before the first: a step allocates nothing.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        inputs_embeds: NDArray[Any],
        lengths: NDArray[np.int64],
        more: StepInputs | None = None,
    ) -> None:
        self._decoder = decoder
        self._more = more
        self._cache: KvCache | None = cache
        self._lengths = lengths.copy()
        self.logits = self._prefill(inputs_embeds, cache)
        self._input_ids = np.zeros((len(lengths), 1), np.int64)
        # As wide as the cache: its shape never changes, and the graph reads a row's length from its sum.
        self._mask = (np.arange(cache.capacity) < lengths[:, None]).astype(np.int64)
        self._calls: tuple[Call, Call] | None = None

    def step(self, token_ids: Sequence[int], active: Sequence[bool]) -> None:
        """Feed each active row its token and compute the next `logits`; those of other rows are void."""
        if self._cache is None:
            raise RuntimeError("this decoding is closed")
        embed, decode = self._calls = self._calls or self._bind(self._cache)
        self._input_ids[:, 0] = token_ids
        rows = np.flatnonzero(active)
        self._mask[rows, self._lengths[rows]] = 1
        self._lengths[rows] += 1
        if self._more is not None:
            self._more.advance(self._lengths)
        embed()
        decode()

    def close(self) -> None:
        """Hand the cache back; the second time nothing happens."""
        cache, self._cache, self._calls = self._cache, None, None
        if cache is not None:
            self._decoder.give_back(cache)

    def _prefill(self, inputs_embeds: NDArray[Any], cache: KvCache) -> NDArray[Any]:
        mask = (np.arange(inputs_embeds.shape[1]) < self._lengths[:, None]).astype(np.int64)
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": mask,
            "logits_position": self._lengths - 1,
            **(self._more.prefill() if self._more is not None else {}),
        }
        return self._decoder.llm.run(inputs, cache=cache)["logits"]

    def _bind(self, cache: KvCache) -> tuple[Call, Call]:
        """The two calls of a step: token ids to embeddings, embeddings to `self.logits`."""
        batch, embed_tokens, llm = len(self._lengths), self._decoder.embed_tokens, self._decoder.llm
        spec = llm.contract.input("inputs_embeds")
        shared = llm.memory if llm.memory is embed_tokens.memory else None
        empty = np.zeros if shared is None else shared.empty
        inputs_embeds = empty((batch, 1, int(spec.shape[-1])), spec.dtype)
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": self._mask,
            "logits_position": np.zeros(batch, np.int64),
            **(self._more.step() if self._more is not None else {}),
        }
        embed = embed_tokens.bind({"input_ids": self._input_ids}, {"inputs_embeds": inputs_embeds})
        return embed, llm.bind(inputs, {"logits": self.logits}, cache=cache)
