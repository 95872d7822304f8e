"""Flamingo's two graphs against transformers' model: ragged batches with and without pictures, then several tokens.

Every row is compared with its own run through PyTorch without padding and without cache. The decoder gets PyTorch's
own keys and values of the pictures, so a fault shows in the graph that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...models.contract import KvCacheContract
from ...models.flamingo_contract import FlamingoContract
from ...models.idefics import FlamingoCrossKv, FlamingoDecoder, reference_idefics
from ..checks import BATCH_SIZES, FloatArray, open_session
from .check import STEPS, check_both_activations, compare_cross, compare_steps, run_steps
from .dequantize import dequantize_into

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
# More than in check.py: behind open gates, cross-attention adds layers that round. Measured on random models of the
# tests: up to 14 % of the largest logit. What is wrong in a graph shows in its second run, with FP32 activations.
INT8_ACTIVATIONS_OF_LARGEST = 0.25
_LONGEST_PROMPT = 9
_MOST_IMAGES = 3
# Room in the cache behind the last token, which the graph must not read.
_SPARE = 3


@dataclass(frozen=True)
class FlamingoRow:
    """One row through PyTorch.

    `image_features` `[images * latents, Dv]`; `cross` `[2 * layers][heads, images * latents, size]`; `embeds`
    `[length + STEPS, D]`; `seen` `[length + STEPS, images]`, which pictures each token sees; `logits` `[1 + STEPS,
    V]` after the first `length` tokens and after each step.
    """

    image_features: FloatArray
    cross: tuple[FloatArray, ...]
    embeds: FloatArray
    seen: IntArray
    length: int
    logits: FloatArray


Batches = Sequence[Sequence[FlamingoRow]]


def make_flamingo_batches(
    cross_kv: FlamingoCrossKv,
    decoder: FlamingoDecoder,
    contract: FlamingoContract,
    *,
    quantized: Path | None = None,
) -> list[list[FlamingoRow]]:
    """Batches of 1, 3 and 5 rows of random embeddings, with 1 to 3 pictures, through transformers' Idefics.

    Any token may see any pictures, or none. ``quantized``: the graph of `decoder`, whose weights, dequantised, replace
    the module's first.
    """
    if quantized is not None:
        dequantize_into(decoder, quantized)
    model = reference_idefics(decoder, cross_kv)
    random = np.random.default_rng(0)
    return [[_run_row(model, cross_kv, contract, random) for _ in range(size)] for size in BATCH_SIZES]


def _run_row(
    model: Any, cross_kv: FlamingoCrossKv, contract: FlamingoContract, random: np.random.Generator
) -> FlamingoRow:
    config = model.config
    length, images = int(random.integers(1, _LONGEST_PROMPT + 1)), int(random.integers(1, _MOST_IMAGES + 1))
    width = config.vision_config.embed_dim
    embeds = random.standard_normal((length + STEPS, config.hidden_size)).astype(np.float32)
    features = random.standard_normal((images, contract.latents, width)).astype(np.float32)
    seen = random.integers(0, 2, (length + STEPS, images))
    with torch.inference_mode():
        result = model(
            inputs_embeds=torch.from_numpy(embeds)[None],
            perceiver_embeddings=torch.from_numpy(features)[None],
            image_attention_mask=torch.from_numpy(seen)[None],
            use_cache=False,
        )
        flat = torch.from_numpy(features).flatten(0, 1)
        cross = tuple(states[0].numpy() for states in _their_key_values(model, flat[None]))
    logits = result.logits[0, length - 1 :].float().numpy()
    return FlamingoRow(flat.numpy(), cross, embeds, seen, length, logits)


def _their_key_values(model: Any, features: torch.Tensor) -> list[torch.Tensor]:
    """What transformers' cross-attention layers make of `features` `[1, K, Dv]`: `[1, heads, K, size]`."""
    found = []
    for layer in model.model.gated_cross_attn_layers:
        attention = layer.cross_attn
        shape = (1, features.shape[1], attention.num_heads, attention.head_dim)
        key, value = (project(features).view(shape).transpose(1, 2) for project in (attention.k_proj, attention.v_proj))
        found += [attention.k_layer_norm(key) if attention.qk_layer_norms else key, value]
    return found


def check_cross_kv(path: Path, batches: Batches, contract: FlamingoContract) -> dict[str, Any]:
    """The keys and values of every cross-attention layer; raises ExportError where they differ from PyTorch's."""
    session = open_session(path)
    return {
        "batch_sizes": [len(batch) for batch in batches],
        "max_abs": max(_compare_cross(session, batch, contract) for batch in batches),
    }


def check_flamingo_decoder(
    path: Path, batches: Batches, cache: KvCacheContract, contract: FlamingoContract, *, precision: str
) -> dict[str, Any]:
    """Logits after prompts and after STEPS single tokens; raises ExportError where they differ from PyTorch's.

    A quantised graph runs as it is, within what INT8 activations cost, and once more with FP32 activations.
    """

    def worst(graph: Path, of_largest: float | None) -> float:
        session = open_session(graph, prepack=precision == "int4")
        return max(_compare_logits(session, batch, cache, contract, of_largest) for batch in batches)

    found = check_both_activations(path, precision, worst, int8_activations_of_largest=INT8_ACTIVATIONS_OF_LARGEST)
    return {"batch_sizes": [len(batch) for batch in batches], "decode_steps": STEPS, **found}


def _compare_cross(session: Any, batch: Sequence[FlamingoRow], contract: FlamingoContract) -> float:
    names = list(contract.cross_cache.names())
    results = session.run(names, {"image_features": _pad([row.image_features for row in batch])})
    return compare_cross(results, names, [row.cross for row in batch], "cross_kv")


def _compare_logits(
    session: Any,
    batch: Sequence[FlamingoRow],
    cache: KvCacheContract,
    contract: FlamingoContract,
    of_largest: float | None,
) -> float:
    capacity = max(row.length for row in batch) + STEPS + _SPARE
    pictures = {
        name: _pad([row.cross[i].transpose(1, 0, 2) for row in batch]).transpose(0, 2, 1, 3)
        for i, name in enumerate(contract.cross_cache.names())
    }
    found = run_steps(
        session, cache, len(batch), capacity, lambda step: {**_step_inputs(batch, step, capacity), **pictures}
    )
    return compare_steps(found, [row.logits for row in batch], "the prompt", of_largest)


def _step_inputs(batch: Sequence[FlamingoRow], step: int, capacity: int) -> dict[str, Any]:
    """Inputs of the prompts (`step` 0), right-padded, or of the `step`-th token after each."""
    lengths = np.array([row.length for row in batch])
    cut: Callable[[FlamingoRow], slice]
    if step == 0:
        cut, width, position = (lambda row: slice(row.length)), int(lengths.max()), lengths - 1
    else:
        cut = lambda row: slice(row.length + step - 1, row.length + step)  # noqa: E731
        width, position = capacity, np.zeros_like(lengths)
    return {
        "inputs_embeds": _pad([row.embeds[cut(row)] for row in batch]),
        "attention_mask": (np.arange(width)[None] < lengths[:, None] + step).astype(np.int64),
        "logits_position": position,
        "image_attention_mask": _pad([row.seen[cut(row)] for row in batch]),
    }


def _pad(rows: Sequence[Any]) -> Any:
    """Arrays of one rank to one array, zeros at the end of every axis."""
    shape = np.max([row.shape for row in rows], axis=0)
    return np.stack(
        [np.pad(row, [(0, most - size) for size, most in zip(row.shape, shape, strict=True)]) for row in rows]
    )
