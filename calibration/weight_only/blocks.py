"""Weights as whole numbers with one scale for each block of a column, and how operators store them.

A weight is `[K, N]`, as MatMul reads it; blocks of `block_size` run along K. Symmetric: 0 is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
# Weights of some blocks `[blocks, block_size, N]` and a number of bits -> scales `[blocks, N]`.
ScaleRule = Callable[[Floats, int], Floats]
# Clipping tried for a positive scale, as parts of the largest magnitude. The optimum of a bell-shaped block of 32 to
# 128 weights lies between 0.8 and 1 for 4 bits.
_SHRINKS: Floats = np.linspace(1.0, 0.75, 11, dtype=np.float32)
# The smallest number of FP16: a scale that becomes 0 there is no scale.
_LEAST_SCALE = np.float32(2.0**-24)
_COLUMNS = 8192


@dataclass(frozen=True)
class BlockedWeight:
    """`values` int8 `[K, N]`, `scales` float32 `[blocks, N]`."""

    values: NDArray[np.int8]
    scales: Floats
    block_size: int

    def dequantized(self) -> Floats:
        """The weight that the operators compute with, `[K, N]`."""
        scales = np.repeat(self.scales, self.block_size, axis=0)[: len(self.values)]
        product: Floats = self.values.astype(np.float32) * scales
        return product


def signed_scales(blocks: Floats, bits: int) -> Floats:
    """The number of largest magnitude falls on the lowest level, so a scale is negative where that number is positive.

    The rule of ONNX Runtime's kernels (`quantize_matmul_4bits`): all `2**bits` levels are used.
    """
    low, high = blocks.min(axis=1), blocks.max(axis=1)
    extreme = np.where(np.abs(high) > np.abs(low), high, low)
    scales: Floats = (extreme / -(2.0 ** (bits - 1))).astype(np.float32)
    return scales


def positive_scales(blocks: Floats, bits: int) -> Floats:
    """The scale above 0 with the least squared error, some clipping allowed: TensorRT takes no other scales."""
    absmax = np.abs(blocks).max(axis=1)
    best, least = np.ones_like(absmax), np.full_like(absmax, np.inf)
    for shrink in _SHRINKS:
        tried = np.where(absmax > 0, absmax * shrink / (2 ** (bits - 1) - 1), 1).astype(np.float32)
        error = np.square(to_levels(blocks, tried[:, None], bits) * tried[:, None] - blocks).sum(axis=1)
        best, least = np.where(error < least, tried, best), np.minimum(error, least)
    scales: Floats = np.maximum(best, _LEAST_SCALE)
    return scales


def round_to_nearest(weight: Floats, bits: int, block_size: int, rule: ScaleRule) -> BlockedWeight:
    """Every weight goes to the nearest level of its block; `weight` `[K, N]`."""

    def round_part(part: Floats) -> BlockedWeight:
        blocks = as_blocks(part, block_size)
        scales = rule(blocks, bits)
        values = to_levels(blocks, scales[:, None], bits).reshape(-1, part.shape[1])[: len(part)]
        return BlockedWeight(values.astype(np.int8), scales, block_size)

    return by_columns(weight, round_part)


def by_columns(weight: Floats, quantize: Callable[[Floats], BlockedWeight]) -> BlockedWeight:
    """`quantize` of some columns at a time: the intermediate arrays of an LM head would be gigabytes."""
    parts = [quantize(weight[:, start : start + _COLUMNS]) for start in range(0, weight.shape[1], _COLUMNS)]
    values, scales = (np.concatenate([getattr(part, name) for part in parts], 1) for name in ("values", "scales"))
    return BlockedWeight(values, scales, parts[0].block_size)


def as_blocks(weight: Floats, block_size: int) -> Floats:
    """`[blocks, block_size, N]`, the last block filled with zeros."""
    filled = np.pad(weight, ((0, -len(weight) % block_size), (0, 0)))
    blocks: Floats = filled.reshape(-1, block_size, weight.shape[1])
    return blocks


def pack_for_matmul_nbits(weight: BlockedWeight, bits: int) -> tuple[NDArray[np.uint8], Floats]:
    """`B` uint8 `[N, blocks, block_size * bits / 8]`, the low half of a byte first, and scales `[N, blocks]`.

    Layout: onnxruntime ContribOperators.md, MatMulNBits; without zero points `2**(bits - 1)` stands for 0.
    """
    zero = 2 ** (bits - 1)
    rows = len(weight.scales) * weight.block_size
    filled = np.pad(weight.values, ((0, rows - len(weight.values)), (0, 0)))
    codes = (filled.T.astype(np.int16) + zero).astype(np.uint8)
    codes = codes.reshape(codes.shape[0], -1, weight.block_size)
    packed = codes if bits == 8 else codes[..., ::2] | (codes[..., 1::2] << 4)
    return np.ascontiguousarray(packed), np.ascontiguousarray(weight.scales.T)


def pack_int4(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two's complement nibbles of `values` in order, two to a byte, the low half first: ONNX's INT4."""
    codes = np.pad(values.reshape(-1).view(np.uint8) & np.uint8(0x0F), (0, values.size % 2))
    packed: NDArray[np.uint8] = codes[::2] | (codes[1::2] << np.uint8(4))
    return packed


def to_levels(weight: Floats, scales: Floats, bits: int) -> Floats:
    """Whole numbers within the levels, nearest to `weight / scales`, halves to even."""
    # Blocks of zeros, and of numbers so small that the inverse is infinite, become 0.
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=np.abs(scales) > np.finfo(np.float32).tiny)
    levels: Floats = np.clip(np.rint(weight * inverse), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return levels
