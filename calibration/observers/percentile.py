"""The range that all but a share of the values fall into."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..records import TensorRange
from .histogram import Bins
from .settings import ObserverSettings
from .summary import Summary


def percentile_range(summary: Summary, settings: ObserverSettings) -> TensorRange:
    """Between the percentiles `100 - p` and `p`, as `numpy.percentile` (linear) has them, to the width of a bin.

    The digits of `p` matter: 99.9 clips one value in 1000 at each end, which in a ViT is every token's largest
    channels; 99.999 clips none of them (FQ-ViT, arXiv 2111.13824, takes 99.999 too).
    """
    share = settings.percentile / 100.0
    ends = (quantile(summary.bins, q) for q in (1.0 - share, share))
    low, high = (min(max(end, summary.minimum), summary.maximum) for end in ends)
    return TensorRange(low, high)


def quantile(bins: Bins, q: float) -> float:
    """The value below which a share `q` lies; values are taken to be spread evenly inside their bin."""
    seen = np.cumsum(bins.counts)
    place = q * (int(seen[-1]) - 1)
    below = math.floor(place)
    values = [_ranked(bins, seen, rank) for rank in (below, min(below + 1, int(seen[-1]) - 1))]
    return values[0] + (values[1] - values[0]) * (place - below)


def _ranked(bins: Bins, seen: NDArray[np.int64], rank: int) -> float:
    """The value of the given rank, counted from 0 at the smallest."""
    index = int(np.searchsorted(seen, rank, side="right"))
    count = int(bins.counts[index])
    inside = (rank - (int(seen[index]) - count) + 0.5) / count
    return float(bins.lower[index] + (bins.upper[index] - bins.lower[index]) * inside)
