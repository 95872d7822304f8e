"""Statistics of tensors whose channels were divided by a scale, without another look at the data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .observers import RANGE_OBSERVERS, ObserverSettings
from .observers.histogram import FloatHistogram
from .observers.summary import Summary
from .records import FloatArray, TensorRange, TensorStats


def divide_channels(stats: TensorStats, scale: FloatArray, settings: ObserverSettings) -> TensorStats:
    """`stats` of `X` `[..., C]` as those of `X / scale`; the observers are those of `stats`.

    Extremes, and with them "minmax", are exact, since they are known per channel. "percentile", "mse" and "entropy"
    see the observed rows, which are an even sample; "moving-average" keeps its share of the min-max range.
    """
    low, high = known(stats.channel_min) / scale, known(stats.channel_max) / scale
    rows = np.asarray(known(stats.rows) / scale, dtype=np.float32)
    histogram = FloatHistogram()
    histogram.add(np.ascontiguousarray(rows), float(np.abs(rows).max(initial=0.0)))
    smallest, largest = float(low.min()), float(high.max())
    share = _averaged_share(stats)
    summary = Summary(smallest, largest, smallest * share, largest * share, histogram.bins())
    ranges = {name: RANGE_OBSERVERS[name](summary, settings) for name in stats.ranges}
    return TensorStats(smallest, largest, ranges, low, high, rows)


def split_heads(stats: TensorStats, size: int) -> TensorStats:
    """Statistics of `[..., heads * size]` as those of the same numbers with `size` as the last axis."""
    rows = known(stats.rows)
    return replace(
        stats,
        channel_min=known(stats.channel_min).reshape(-1, size).min(axis=0),
        channel_max=known(stats.channel_max).reshape(-1, size).max(axis=0),
        rows=rows.reshape(-1, size)[: len(rows)],
    )


def known(array: FloatArray | None) -> FloatArray:
    """`array`; ValueError where a tensor was observed without it."""
    if array is None:
        raise ValueError("the tensor was observed without its channels")
    return array


def _averaged_share(stats: TensorStats) -> float:
    """How much of the min-max range the moving average is; 1 where it did not run."""
    whole = TensorRange(stats.minimum, stats.maximum).absmax
    averaged = stats.ranges.get("moving-average")
    return averaged.absmax / whole if averaged is not None and whole else 1.0
