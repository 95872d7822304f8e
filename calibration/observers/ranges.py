"""The observers by name."""

from __future__ import annotations

from collections.abc import Callable

from ..records import TensorRange
from .entropy import entropy_range
from .mse import mse_range
from .percentile import percentile_range
from .settings import ObserverSettings
from .summary import Summary


def minmax_range(summary: Summary, settings: ObserverSettings) -> TensorRange:
    """All that was seen."""
    return TensorRange(summary.minimum, summary.maximum)


def moving_average_range(summary: Summary, settings: ObserverSettings) -> TensorRange:
    """The average sample's extremes: one odd picture does not stretch it."""
    return TensorRange(summary.mean_minimum, summary.mean_maximum)


RANGE_OBSERVERS: dict[str, Callable[[Summary, ObserverSettings], TensorRange]] = {
    "minmax": minmax_range,
    "moving-average": moving_average_range,
    "percentile": percentile_range,
    "mse": mse_range,
    "entropy": entropy_range,
}
