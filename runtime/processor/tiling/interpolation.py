"""Bilinear interpolation of a feature map as rows and weights, so that it works on features wherever they lie."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def interpolate_rows(
    rows: npt.NDArray[np.int64], size: tuple[int, int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """What each place of the scaled map is a weighted sum of.

    `rows`: `[H, W]` row numbers. `size`: `(height, width)`, each at least 1. Returns rows and weights
    `[height, width, 4]`: the four neighbours of torch's `interpolate(mode="bilinear", align_corners=False)`, in its
    float32 arithmetic.
    """
    (top, bottom, down), (left, right, across) = (
        _neighbours(old, new) for old, new in zip(rows.shape, size, strict=True)
    )
    corners = [rows[np.ix_(vertical, horizontal)] for vertical in (top, bottom) for horizontal in (left, right)]
    one = np.float32(1)
    weights = [
        vertical[:, None] * horizontal[None, :]
        for vertical in (one - down, down)
        for horizontal in (one - across, across)
    ]
    return np.stack(corners, axis=-1), np.stack(weights, axis=-1)


def _neighbours(old: int, new: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Of each new place on an axis: the old place before it, the one after it, and the latter's weight."""
    # In float64 and rounded once: torch's product and difference are one fused operation.
    scale = np.float64(np.float32(old) / np.float32(new))
    centres = np.maximum((np.arange(new) + 0.5) * scale - 0.5, 0).astype(np.float32)
    before = centres.astype(np.int64)
    after = np.minimum(before + 1, old - 1)
    return before, after, centres - before.astype(np.float32)
