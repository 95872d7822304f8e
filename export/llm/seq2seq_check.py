"""T5's two graphs against transformers' model: prompts of different lengths in one batch, then several tokens.

Every row is compared with its own run through PyTorch without padding. The decoder gets PyTorch's own keys and values
of the prompt, so a fault shows in the graph that has it. Rows of the decoder begin with different numbers of tokens,
and go on one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...models.contract import KvCacheContract
from ...models.seq2seq_contract import CrossCacheContract
from ...models.t5 import T5LanguageDecoder, T5LanguageEncoder, reference_t5
from ..checks import BATCH_SIZES, FloatArray, open_session
from .check import STEPS, check_both_activations, compare_cross, compare_steps, run_steps
from .dequantize import dequantize_into

# Beyond relative_attention_max_distance of none, and long enough for several of T5's buckets.
_LONGEST_PROMPT = 23
_LONGEST_START = 4
# Room in the cache behind the last token, which the graph must not read.
_SPARE = 3


@dataclass(frozen=True)
class Seq2SeqRow:
    """One row through PyTorch: `inputs_embeds` `[E, D]`, `cross` `[2 * layers][heads, E, size]`, `decoder_embeds`
    `[length + STEPS, D]`, `logits` `[1 + STEPS, V]` after the first `length` tokens and after each step.
    """

    inputs_embeds: FloatArray
    cross: tuple[FloatArray, ...]
    decoder_embeds: FloatArray
    length: int
    logits: FloatArray


Batches = Sequence[Sequence[Seq2SeqRow]]


def make_seq2seq_batches(
    embed_tokens: Any,
    encoder: T5LanguageEncoder,
    decoder: T5LanguageDecoder,
    text: Any,
    *,
    quantized: tuple[Path, Path] | None = None,
) -> list[list[Seq2SeqRow]]:
    """Batches of 1, 3 and 5 rows of random tokens through transformers' T5.

    ``quantized``: the graphs of encoder and decoder, whose weights, dequantised, replace those of the modules first.
    """
    if quantized is not None:
        for module, path in zip((encoder, decoder), quantized, strict=True):
            dequantize_into(module, path)
    model = reference_t5(encoder, decoder, text)
    random = np.random.default_rng(0)
    return [[_run_row(model, embed_tokens, random) for _ in range(size)] for size in BATCH_SIZES]


def _run_row(model: Any, embed_tokens: Any, random: np.random.Generator) -> Seq2SeqRow:
    length = int(random.integers(1, _LONGEST_START + 1))
    counts = (int(random.integers(1, _LONGEST_PROMPT + 1)), length + STEPS)
    with torch.inference_mode():
        prompt, answer = (
            embed_tokens(torch.from_numpy(random.integers(0, embed_tokens.num_embeddings, (1, n)))) for n in counts
        )
        result = model(inputs_embeds=prompt, decoder_inputs_embeds=answer, use_cache=True)
    layers = result.past_key_values.cross_attention_cache.layers
    cross = tuple(states[0].numpy() for layer in layers for states in (layer.keys, layer.values))
    logits = result.logits[0, length - 1 :].float().numpy()
    return Seq2SeqRow(prompt[0].numpy(), cross, answer[0].numpy(), length, logits)


def check_llm_encoder(path: Path, batches: Batches, cross: CrossCacheContract, *, precision: str) -> dict[str, Any]:
    """The keys and values of every decoder layer; raises ExportError where they differ from PyTorch's."""
    return _check(path, batches, precision, lambda session, batch, limit: _compare_cross(session, batch, cross, limit))


def check_llm_decoder(
    path: Path, batches: Batches, cache: KvCacheContract, cross: CrossCacheContract, *, precision: str
) -> dict[str, Any]:
    """Logits after several first tokens and after STEPS single ones; raises ExportError where they differ."""
    found = _check(
        path, batches, precision, lambda session, batch, limit: _compare_logits(session, batch, cache, cross, limit)
    )
    return {"decode_steps": STEPS, **found}


def _check(
    path: Path,
    batches: Batches,
    precision: str,
    compare_batch: Callable[[Any, Sequence[Seq2SeqRow], float | None], float],
) -> dict[str, Any]:
    """A quantised graph runs as it is, within what INT8 activations cost, and once more with FP32 activations."""

    def worst(graph: Path, limit: float | None) -> float:
        session = open_session(graph, prepack=precision == "int4")
        return max(compare_batch(session, batch, limit) for batch in batches)

    return {
        "batch_sizes": [len(batch) for batch in batches],
        **check_both_activations(path, precision, worst),
    }


def _compare_cross(
    session: Any, batch: Sequence[Seq2SeqRow], cross: CrossCacheContract, of_largest: float | None
) -> float:
    names = list(cross.names())
    results = session.run(names, {"inputs_embeds": _pad([row.inputs_embeds for row in batch]), **_mask(batch)})
    return compare_cross(results, names, [row.cross for row in batch], "llm_encoder", of_largest)


def _compare_logits(
    session: Any,
    batch: Sequence[Seq2SeqRow],
    cache: KvCacheContract,
    cross: CrossCacheContract,
    of_largest: float | None,
) -> float:
    capacity = max(row.length for row in batch) + STEPS + _SPARE
    prompt = _mask(batch, "encoder_attention_mask")
    for i, name in enumerate(cross.names()):
        prompt[name] = _pad([row.cross[i].transpose(1, 0, 2) for row in batch]).transpose(0, 2, 1, 3)
    found = run_steps(
        session, cache, len(batch), capacity, lambda step: {**_step_inputs(batch, step, capacity), **prompt}
    )
    return compare_steps(found, [row.logits for row in batch], "the first tokens", of_largest)


def _step_inputs(batch: Sequence[Seq2SeqRow], step: int, capacity: int) -> dict[str, Any]:
    """Inputs of the first tokens (`step` 0), right-padded, or of the `step`-th token after them."""
    lengths = np.array([row.length for row in batch])
    if step == 0:
        embeds = _pad([row.decoder_embeds[: row.length] for row in batch])
        width, position = int(lengths.max()), lengths - 1
    else:
        embeds = np.stack([row.decoder_embeds[row.length + step - 1 : row.length + step] for row in batch])
        width, position = capacity, np.zeros(len(batch), np.int64)
    mask = (np.arange(width)[None] < lengths[:, None] + step).astype(np.int64)
    return {"inputs_embeds": embeds, "attention_mask": mask, "logits_position": position}


def _pad(rows: Sequence[FloatArray]) -> FloatArray:
    """Rows `[S, ...]` to `[B, longest S, ...]`, zeros on the right."""
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row, ((0, longest - len(row)), *((0, 0),) * (row.ndim - 1))) for row in rows])


def _mask(batch: Sequence[Seq2SeqRow], name: str = "attention_mask") -> dict[str, Any]:
    lengths = np.array([len(row.inputs_embeds) for row in batch])
    return {name: (np.arange(lengths.max())[None] < lengths[:, None]).astype(np.int64)}
