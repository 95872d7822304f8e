"""Everything that is kept of one tensor while samples go by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records import TensorStats
from .histogram import FloatHistogram
from .ranges import RANGE_OBSERVERS
from .reservoir import RowReservoir
from .settings import ObserverSettings
from .summary import Summary


class TensorObserver:
    """One tensor, its samples given one after the other.

    `channels`: whether the last axis has the same meaning in every sample; if not (or when its size turns out to
    change) nothing is kept per channel, and no rows.
    """

    def __init__(self, name: str, settings: ObserverSettings, *, channels: bool = True) -> None:
        self.name = name
        self._settings = settings
        self._channels = channels
        self._samples = 0
        self._extremes = np.array([math.inf, -math.inf])
        self._averages = np.zeros(2)
        self._channel_min: NDArray[np.float32] | None = None
        self._channel_max: NDArray[np.float32] | None = None
        self._histogram = FloatHistogram()
        self._reservoir = RowReservoir(name, settings.rows if channels else 0, settings.seed)

    @property
    def samples(self) -> int:
        """How many samples with at least one value were seen."""
        return self._samples

    def update(self, value: NDArray[Any], sample: int) -> bool:
        """Take in `value`, any shape, of the sample numbered `sample`.

        False, with nothing changed, when it is not finite.
        """
        if value.size == 0:
            return True
        array = np.ascontiguousarray(value, dtype=np.float32)
        rows = array.reshape(-1, array.shape[-1] if array.ndim > 1 else array.size)
        low, high = rows.min(axis=0), rows.max(axis=0)
        extremes = np.array([low.min(), high.max()], dtype=np.float64)
        if not np.isfinite(extremes).all():
            return False
        self._average(extremes)
        self._extremes = np.array([min(self._extremes[0], extremes[0]), max(self._extremes[1], extremes[1])])
        if array.ndim < 2 or (self._channel_min is not None and self._channel_min.shape != low.shape):
            self._drop_channels()
        if self._channels:
            self._channel_min = low if self._channel_min is None else np.minimum(self._channel_min, low)
            self._channel_max = high if self._channel_max is None else np.maximum(self._channel_max, high)
            self._reservoir.add(rows, sample)
        self._histogram.add(array, float(np.abs(extremes).max()))
        return True

    def _drop_channels(self) -> None:
        self._channels = False
        self._channel_min = self._channel_max = None
        self._reservoir = RowReservoir(self.name, 0, self._settings.seed)

    def _average(self, extremes: NDArray[np.float64]) -> None:
        self._samples += 1
        weight = 1.0 / self._samples
        if self._samples > 1 and self._settings.averaging is not None:
            weight = self._settings.averaging
        self._averages = self._averages + (extremes - self._averages) * weight

    def finish(self) -> TensorStats:
        """What was observed; needs one sample at least."""
        low, high, mean_low, mean_high = map(float, (*self._extremes, *self._averages))
        summary = Summary(low, high, mean_low, mean_high, self._histogram.bins())
        ranges = {name: RANGE_OBSERVERS[name](summary, self._settings) for name in self._settings.observers}
        return TensorStats(
            summary.minimum, summary.maximum, ranges, self._channel_min, self._channel_max, self._reservoir.rows()
        )

    def state(self) -> dict[str, NDArray[Any]]:
        """All of it as arrays, for `restore`."""
        state: dict[str, NDArray[Any]] = {"samples": np.array(self._samples), "channels": np.array(self._channels)}
        state |= {"extremes": self._extremes, "averages": self._averages}
        if self._channel_min is not None and self._channel_max is not None:
            state |= {"channel_min": self._channel_min, "channel_max": self._channel_max}
        return state | self._histogram.state() | self._reservoir.state()

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave."""
        if not bool(state["channels"]):
            self._drop_channels()
        self._samples = int(state["samples"])
        self._extremes, self._averages = np.array(state["extremes"]), np.array(state["averages"])
        self._channel_min, self._channel_max = state.get("channel_min"), state.get("channel_max")
        self._histogram.restore(state)
        self._reservoir.restore(state)
