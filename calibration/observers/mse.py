"""The range with the least mean squared error of quantisation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..records import TensorRange
from .settings import ObserverSettings
from .summary import Summary

# Thresholds from the largest magnitude down to 2^-10 of it, eight to an octave, then a finer search around the best.
_COARSE = 2.0 ** (-np.arange(81) / 8)
_FINE = 2.0 ** (np.arange(-7, 8) / 64)


def mse_range(summary: Summary, settings: ObserverSettings) -> TensorRange:
    """Clip at the threshold, the same for both ends, that costs least: fewer clipped values against finer steps."""
    absmax = max(abs(summary.minimum), abs(summary.maximum))
    if absmax == 0.0:
        return TensorRange(summary.minimum, summary.maximum)
    # In units of the largest magnitude, so that no square leaves the range of floats.
    values = summary.bins.centres / absmax
    powers = np.stack((np.ones_like(values), values, values**2)) * summary.bins.counts
    moments = np.concatenate((np.zeros((3, 1)), np.cumsum(powers, axis=1)), axis=1)
    low, high = summary.minimum / absmax, summary.maximum / absmax

    def best(thresholds: NDArray[np.float64]) -> float:
        errors = [_error(values, moments, max(low, -one), min(high, one), settings) for one in thresholds.tolist()]
        return float(thresholds[int(np.argmin(errors))])

    threshold = best(np.minimum(best(_COARSE) * _FINE[::-1], 1.0)) * absmax
    return TensorRange(max(summary.minimum, -threshold), min(summary.maximum, threshold))


def _error(
    values: NDArray[np.float64], moments: NDArray[np.float64], low: float, high: float, settings: ObserverSettings
) -> float:
    """Sum of squared errors of ascending `values` `[K]`, quantised to `[low, high]`.

    `moments` `[3, K + 1]`: running sums of counts, counts x value and counts x value^2. A bin is narrower than an
    eighth of a step, so it goes to one level as a whole, and the sums between levels give the error of each.
    """
    levels = settings.levels()
    if settings.symmetric:
        step, first, last = max(-low, high) / levels, -levels - 1, levels
    else:
        step = (max(high, 0.0) - min(low, 0.0)) / (2 * levels + 1)
        first = round(min(low, 0.0) / step)  # minus the zero point
        last = first + 2 * levels + 1
    numbers = np.arange(first, last + 1)
    cuts = np.searchsorted(values, (numbers[:-1] + 0.5) * step)
    zeroth, mean, square = np.diff(moments[:, np.concatenate(([0], cuts, [values.size]))], axis=1)
    levels_at = numbers * step
    return float((square - 2 * levels_at * mean + levels_at**2 * zeroth).sum())
