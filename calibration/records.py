"""What was observed of the tensors of one graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class TensorRange:
    """The interval of values that 8 bits are to cover; what lies outside is clipped."""

    low: float
    high: float

    @property
    def absmax(self) -> float:
        """The larger magnitude of both ends: symmetric quantisation covers `[-absmax, absmax]`."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class TensorStats:
    """One tensor over all samples.

    `minimum`, `maximum`: exact. `ranges`: what each observer chose, by its name ("minmax", "moving-average",
    "percentile", "mse", "entropy"). `channel_min`, `channel_max`: exact, `[C]` over the last axis, None for a tensor
    whose last axis is dynamic. `rows`: `[R, C]`, rows (tokens) drawn evenly from all samples.
    """

    minimum: float
    maximum: float
    ranges: Mapping[str, TensorRange]
    channel_min: FloatArray | None = None
    channel_max: FloatArray | None = None
    rows: FloatArray | None = None


@dataclass(frozen=True)
class Observations:
    """All observed tensors of one graph, by value name.

    `key`: SHA-256 over the graph, the data and the settings. `samples`: how many were seen.
    """

    key: str
    samples: int
    tensors: Mapping[str, TensorStats] = field(default_factory=dict)

    def ranges(self, observer: str) -> dict[str, TensorRange]:
        """Value name -> the range that `observer` chose; KeyError for an observer that did not run."""
        return {name: stats.ranges[observer] for name, stats in self.tensors.items()}
