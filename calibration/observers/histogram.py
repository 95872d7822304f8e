"""A histogram whose bins are the floating-point numbers of 10 mantissa bits.

Bins of equal width are too coarse for activations: one channel that is 1000 times as large as the rest stretches the
range, and all else falls into a handful of bins. Bins of equal *relative* width (2^-10) know every percentile to three
digits whatever lies outside, and a value's bin is a shift of its bits. The window covers 32 powers of two below the
largest magnitude; when a larger one comes it moves up by whole powers of two, bins fall onto bins and nothing has to be
guessed, so that the counts do not depend on the order of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MANTISSA = 10
_SHIFT = np.uint32(23 - _MANTISSA)
_PER_OCTAVE = 1 << _MANTISSA
_OCTAVES = 32
_BINS = _OCTAVES * _PER_OCTAVE  # for each sign
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(31)
_SIGN_BIN = np.uint32(_BINS.bit_length() - 1)
_BLOCK = 1 << 18  # values at a time: they and their bins stay in the cache of a core


@dataclass(frozen=True)
class Bins:
    """The bins that hold something, in ascending order of value: edges and counts, each `[K]`."""

    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    counts: NDArray[np.int64]

    @property
    def centres(self) -> NDArray[np.float64]:
        """`[K]`"""
        return (self.lower + self.upper) / 2


class FloatHistogram:
    """Counts of float32 values by sign, exponent and the first 10 bits of the mantissa.

    Values below 2^-31 of the largest magnitude count as 0.
    """

    def __init__(self) -> None:
        self._base = 0  # the lowest bin of the window, as bits of a float32 without sign shifted by `_SHIFT`
        self._counts = np.zeros((2, _BINS), dtype=np.int64)  # positive, negative

    def add(self, values: NDArray[np.float32], absmax: float) -> None:
        """Count finite `values` (any shape, contiguous), whose largest magnitude is `absmax`."""
        self._grow(absmax)
        bits = values.reshape(-1).view(np.uint32)
        base = np.uint32(self._base)
        flat = self._counts.reshape(-1)
        for start in range(0, bits.size, _BLOCK):
            block = bits[start : start + _BLOCK]
            bins = block & _MAGNITUDE
            bins >>= _SHIFT
            np.maximum(bins, base, out=bins)
            bins -= base
            bins |= (block >> _SIGN) << _SIGN_BIN
            flat += np.bincount(bins, minlength=flat.size)

    def _grow(self, absmax: float) -> None:
        exponent = int(np.float32(absmax).view(np.uint32) >> np.uint32(23))
        base = max(0, exponent - _OCTAVES + 1) * _PER_OCTAVE
        moved = min(base - self._base, _BINS - 1)
        if moved <= 0:
            return
        counts = np.zeros_like(self._counts)
        counts[:, 0] = self._counts[:, : moved + 1].sum(axis=1)
        counts[:, 1 : _BINS - moved] = self._counts[:, moved + 1 :]
        self._base, self._counts = base, counts

    def bins(self) -> Bins:
        """What was counted so far."""
        edges = (np.arange(_BINS + 1, dtype=np.uint32) + np.uint32(self._base)) << _SHIFT
        magnitudes = edges.view(np.float32).astype(np.float64)
        magnitudes[0] = 0.0
        if not np.isfinite(magnitudes[-1]):
            magnitudes[-1] = float(np.finfo(np.float32).max)
        lower = np.concatenate((-magnitudes[:0:-1], magnitudes[:-1]))
        upper = np.concatenate((-magnitudes[-2::-1], magnitudes[1:]))
        counts = np.concatenate((self._counts[1, ::-1], self._counts[0]))
        held = counts > 0
        return Bins(lower[held], upper[held], counts[held])

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that `restore` takes."""
        return {"base": np.array(self._base), "counts": self._counts}

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave."""
        self._base = int(state["base"])
        self._counts = np.array(state["counts"], dtype=np.int64).reshape(2, _BINS)
