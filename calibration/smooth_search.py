"""How strongly to smooth one group: tried on observed rows, judged by the outputs of its products.

The trap: a scale that is made from the largest values of some rows fits just these. With alpha near 1 every channel
fills the range to its end, so every channel clips in pictures that were not seen, and an error that is measured on the
same rows says the opposite. So each alpha is tried twice: ranges and scale from one half of the rows, error on the
other half.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .records import FloatArray, TensorStats
from .smooth_stats import known

# Smoothing must lower the squared error by this share, else it is left off: less is within the noise of the rows.
LEAST_GAIN = 0.05
# A group that needs an extra Mul must gain more: its squared error falls to this share or less ...
MUL_RATIO = 0.5
# ... and by this much of the output's energy (INT8 of a Gaussian activation and weight loses about 2e-4).
MUL_GAIN = 1e-3
# More than that in one channel is a dead channel or a dead weight, not an outlier.
_LARGEST_SCALE = 1e4
_FEWEST_ROWS = 4
_LEAST_ENERGY = 1e-2
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Choice:
    """`alpha` None is off. `error`, `error_off`: mean over products and tokens of |quantised - float|^2 / |float|^2,
    with the chosen alpha and without smoothing. `scale`: `s` `[C]` float32, None when off.
    """

    alpha: float | None
    error: float
    error_off: float
    scale: FloatArray | None = None


class Products:
    """The weights `[C, N]` of a group: the largest magnitude of each row, and columns to try scales on.

    Columns are quantised each for itself, so that some of them speak for all.
    """

    def __init__(self, weights: Iterable[FloatArray], max_columns: int) -> None:
        self.columns: list[FloatArray] = []
        self.absmax: FloatArray = np.zeros(1, np.float32)
        for weight in weights:
            self.absmax = np.maximum(self.absmax, np.abs(weight).max(axis=1))
            self.columns.append(np.ascontiguousarray(weight[:, _evenly(weight.shape[1], max_columns)]))


def smoothing_scale(activations: FloatArray, weights: FloatArray, alpha: float) -> FloatArray:
    """`s = max|X|^alpha / max|W|^(1 - alpha)` per channel, float32 `[C]`, its median 1.

    `activations`, `weights`: the largest magnitudes `[C]` of the activation and of the weights' rows. Source: equation
    4 of Xiao et al. 2023, "SmoothQuant" (arXiv 2211.10438). The median is free to choose (both scales of the quantised
    product follow it); at 1 most numbers keep their size. Channels that are always 0 get 1.
    """
    live = (activations > 0) & (weights > 0)
    scale = np.ones(activations.shape, dtype=np.float64)
    if live.any():
        log = alpha * np.log(activations[live].astype(np.float64)) - (1 - alpha) * np.log(weights[live])
        scale[live] = np.exp(log - np.median(log))
    return np.clip(scale, 1 / _LARGEST_SCALE, _LARGEST_SCALE).astype(np.float32)


def choose_alpha(
    stats: TensorStats,
    products: Products,
    alphas: Sequence[float | None],
    *,
    bits: int,
    needs_mul: bool,
    max_rows: int,
) -> Choice:
    """The alpha that loses least on rows that did not make its scale, off where none is clearly better.

    `stats`: of the activation `[..., C]`, with extremes per channel and rows. Activations are quantised per tensor up
    to their largest magnitude, weights per column, both symmetric.
    """
    folds = _folds(known(stats.rows), max_rows)
    error_off = _error(folds, products, None, bits)
    best = off = Choice(None, error_off, error_off)
    for alpha in (alpha for alpha in alphas if alpha is not None):
        error = _error(folds, products, alpha, bits)
        if error < best.error:
            best = Choice(alpha, error, error_off)
    enough = best.error <= error_off * (1 - LEAST_GAIN)
    if needs_mul:
        enough = best.error <= error_off * MUL_RATIO and error_off - best.error >= MUL_GAIN
    if best.alpha is None or not enough:
        return off
    absmax = np.maximum(np.abs(known(stats.channel_min)), np.abs(known(stats.channel_max)))
    return Choice(best.alpha, best.error, error_off, smoothing_scale(absmax, products.absmax, best.alpha))


@dataclass(frozen=True)
class _Fold:
    """`absmax`: largest magnitudes `[C]` of one half of the rows; `rows`: `[R, C]`, from the other half."""

    absmax: FloatArray
    rows: FloatArray


def _folds(rows: FloatArray, max_rows: int) -> tuple[_Fold, ...]:
    """Each half of the rows tried with what the other half makes; one fold of all where there are very few."""
    rows = rows.astype(np.float32)
    half = len(rows) // 2
    parts = [(rows[:half], rows[half:]), (rows[half:], rows[:half])] if len(rows) >= _FEWEST_ROWS else [(rows, rows)]
    return tuple(_Fold(np.abs(seen).max(axis=0), unseen[_evenly(len(unseen), max_rows)]) for seen, unseen in parts)


def _evenly(size: int, count: int) -> slice:
    return slice(None, None, max(1, -(-size // count)))


def _error(folds: Sequence[_Fold], products: Products, alpha: float | None, bits: int) -> float:
    """Mean of `_loss` over folds and products."""
    levels = 2 ** (bits - 1) - 1
    losses = []
    for fold in folds:
        scale = np.ones_like(fold.absmax)
        if alpha is not None:
            scale = smoothing_scale(fold.absmax, products.absmax, alpha)
        rows = _round(fold.rows / scale, float((fold.absmax / scale).max()) / levels, levels)
        for weight in products.columns:
            quantised = rows @ _round_columns(weight * scale[:, None], levels)
            losses.append(_loss(quantised, fold.rows @ weight))
    return float(np.mean(losses))


def _round(values: FloatArray, step: float, levels: int) -> FloatArray:
    """Symmetric quantisation and back, half to even."""
    if step <= 0:
        return np.zeros_like(values)
    return np.asarray(np.clip(np.rint(values / np.float32(step)), -levels, levels) * np.float32(step))


def _round_columns(weight: FloatArray, levels: int) -> FloatArray:
    """The same per column up to its largest magnitude, in place."""
    steps = np.abs(weight).max(axis=0) / np.float32(levels)
    steps = np.where(steps > 0, steps, np.float32(1.0))
    weight /= steps
    np.rint(weight, out=weight)
    weight *= steps
    return weight


def _loss(actual: FloatArray, expected: FloatArray) -> float:
    """Mean over the tokens (rows) of |actual - expected|^2 / |expected|^2, half of which is what the cosine loses.

    Each token counts alike: in the sum of all, one massive token hides what the others lose. Tokens of less than 1% of
    the mean energy are held against that.
    """
    energy = np.square(expected, dtype=np.float64).sum(axis=1)
    lost = np.square(actual - expected, dtype=np.float64).sum(axis=1)
    floor = max(float(energy.mean()) * _LEAST_ENERGY, _TINY)
    return float(np.mean(lost / np.maximum(energy, floor)))
