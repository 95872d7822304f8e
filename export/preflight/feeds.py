"""Inputs of a stage at given sizes, made without pictures, torch or a checkpoint: any graph must take them.

Floats are standard normal, which is what normalised pixels and hidden states are about; ids and places are 0 or 1,
which every vocabulary has; masks leave nothing out, but of a prompt's last row the last quarter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.contract import TensorSpec

Feed = dict[str, NDArray[Any]]
_MASKS_OF_TOKENS = frozenset({"attention_mask", "encoder_attention_mask", "qformer_attention_mask"})
_MASKS = frozenset({"pixel_attention_mask", "image_attention_mask"})
_POSITION = "logits_position"
_FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.float32}


def shape_of(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The tensor's shape at these sizes."""
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape)


def make_feed(specs: Sequence[TensorSpec], sizes: Mapping[str, int], *, seed: int = 0) -> Feed:
    """An array for every input, C-contiguous; `sizes` has every axis that they name."""
    generator = np.random.default_rng(seed)
    return {spec.name: np.ascontiguousarray(_make(spec, sizes, generator)) for spec in specs}


def padded_tokens(sizes: Mapping[str, int], length: int) -> int:
    """How many of a mask's last places the last row leaves out: only in a prefill of two rows or more."""
    return length // 4 if sizes.get("batch", 1) > 1 and not sizes.get("past_sequence") else 0


def slice_row(feed: Feed, specs: Sequence[TensorSpec], row: int) -> Feed:
    """`feed` with one row of the batch."""
    found = {}
    for spec in specs:
        array = feed[spec.name]
        if "batch" in spec.shape:
            array = np.ascontiguousarray(np.take(array, [row], axis=spec.shape.index("batch")))
        found[spec.name] = array
    return found


def _make(spec: TensorSpec, sizes: Mapping[str, int], generator: np.random.Generator) -> NDArray[Any]:
    shape = shape_of(spec, sizes)
    if spec.dtype in _FLOATS:
        return generator.standard_normal(shape, dtype=np.float32).astype(_FLOATS[spec.dtype])
    if spec.name == _POSITION:
        found = np.full(shape, sizes["sequence"] - 1, np.int64)
        found[-1:] -= padded_tokens(sizes, sizes["sequence"])
        return found
    dtype = np.dtype(spec.dtype)
    if spec.name in _MASKS or spec.name in _MASKS_OF_TOKENS:
        mask = np.ones(shape, dtype)
        padded = padded_tokens(sizes, shape[-1]) if spec.name in _MASKS_OF_TOKENS else 0
        if padded:
            mask[-1, -padded:] = 0
        return mask
    return generator.integers(0, 2, shape).astype(dtype)
