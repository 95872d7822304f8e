"""The range that loses least information (Kullback-Leibler), as TensorRT's entropy calibrator has it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..records import TensorRange
from .histogram import Bins
from .settings import ObserverSettings
from .summary import Summary

_LINEAR_BINS = 2048
_STRIDE = 16


def entropy_range(summary: Summary, settings: ObserverSettings) -> TensorRange:
    """Clip magnitudes at the threshold whose quantised distribution is nearest to the real one.

    Method: S. Migacz, "8-bit inference with TensorRT", GTC 2017: 2048 bins of equal width over the magnitudes; for
    each threshold what lies outside goes into the last bin, the bins are merged to as many levels as there are steps,
    and the divergence of the two is taken. The bin at 0 counts as much as its neighbour: exact zeros cost nothing.
    """
    absmax = max(abs(summary.minimum), abs(summary.maximum))
    levels = settings.levels() + 1
    if absmax < float(np.finfo(np.float32).tiny):
        return TensorRange(summary.minimum, summary.maximum)
    counts = _linear(summary.bins, absmax)
    counts[0] = counts[1]
    held = counts > 0
    logs = counts * np.log(np.where(held, counts, 1.0))
    running = np.cumsum(np.stack((counts, held.astype(np.float64), logs)), axis=1)
    sums: NDArray[np.float64] = np.concatenate((np.zeros((3, 1)), running), axis=1)
    divergences = {end: _divergence(sums, end, levels) for end in range(levels, _LINEAR_BINS + 1, _STRIDE)}
    # The largest of equal ones: nothing is clipped without a gain.
    end = max(divergences, key=lambda one: (-divergences[one], one))
    threshold = absmax * end / _LINEAR_BINS
    return TensorRange(max(summary.minimum, -threshold), min(summary.maximum, threshold))


def _linear(bins: Bins, absmax: float) -> NDArray[np.float64]:
    """Counts of magnitudes in bins of equal width over `[0, absmax]`, `[2048]`; shares where bins cut bins."""
    edges = np.linspace(0.0, absmax, _LINEAR_BINS + 1)
    total = np.zeros(_LINEAR_BINS, dtype=np.float64)
    negative = bins.upper <= 0.0
    for lower, upper, counts in (
        (-bins.upper[negative][::-1], -bins.lower[negative][::-1], bins.counts[negative][::-1]),
        (bins.lower[~negative], bins.upper[~negative], bins.counts[~negative]),
    ):
        if not counts.size:
            continue
        seen = np.cumsum(counts)
        # Counts up to each edge; between bins that hold something the curve is flat.
        places = np.stack((lower, upper), axis=1).reshape(-1)
        curve = np.stack((seen - counts, seen), axis=1).reshape(-1)
        below = np.interp(edges, places, curve, left=0.0)
        below[-1] = seen[-1]
        total += np.diff(below)
    return total


def _divergence(sums: NDArray[np.float64], end: int, levels: int) -> float:
    """KL divergence of the first `end` bins (the last with all beyond) from themselves quantised to `levels`.

    `sums` `[3, 2049]`: running sums of counts c, of bins that hold something, and of c log c. A level spreads its
    counts evenly over those of its bins that hold something.
    """
    starts = -(-np.arange(levels + 1) * end // levels)
    inside, members, _ = np.diff(sums[:, starts], axis=1)
    total, kept = float(sums[0, -1]), float(sums[0, end])
    last = kept - float(sums[0, end - 1])
    if kept == 0.0:
        return math.inf
    beyond = total - kept
    # sum of p log p, where the last bin has what is beyond too
    own = (
        float(sums[2, end - 1]) + (last + beyond) * math.log(last + beyond)
        if last + beyond > 0
        else float(sums[2, end])
    )
    some = inside > 0
    quantised = np.log(inside[some] / members[some])
    cross = float((inside[some] * quantised).sum())
    if last > 0:
        cross += beyond * float(quantised[-1])
    elif beyond > 0:
        # A last bin that holds only what was clipped has no counterpart: as wrong as one value in that place can be.
        cross += beyond * math.log(1e-9 * kept)
    return (own - cross) / total - math.log(total) + math.log(kept)
