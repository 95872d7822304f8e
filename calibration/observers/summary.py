"""What all observers choose a range from."""

from __future__ import annotations

from dataclasses import dataclass

from .histogram import Bins


@dataclass(frozen=True)
class Summary:
    """One tensor over all samples.

    `minimum`, `maximum`: exact. `mean_minimum`, `mean_maximum`: averages of each sample's extremes. `bins`: its
    histogram.
    """

    minimum: float
    maximum: float
    mean_minimum: float
    mean_maximum: float
    bins: Bins
