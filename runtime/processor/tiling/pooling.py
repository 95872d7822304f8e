"""Average pooling of a feature map as rows and weights, so that it works on features wherever they lie."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def pooled_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """`(height, width)` in windows of `stride` x `stride`, one that is cut off by an edge counted too."""
    height, width = size
    return -(-height // stride), -(-width // stride)


def pool_rows(rows: npt.NDArray[np.int64], stride: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """What each place of the pooled map is a weighted sum of.

    `rows`: `[H, W]` row numbers. Returns rows and weights `[h, w, K]`, `(h, w)` as `pooled_size` has it: the mean of
    each window of `stride` x `stride`. A window that is cut off by the right or lower edge is the mean of what is left
    of it; the rest has the weight 0.
    """
    (down, inside_height), (across, inside_width) = (_windows(edge, stride) for edge in rows.shape)
    chosen = rows[down[:, None, :, None], across[None, :, None, :]]
    inside = inside_height[:, None, :, None] & inside_width[None, :, None, :]
    weights = inside / inside.sum(axis=(2, 3), keepdims=True)
    shape = (*chosen.shape[:2], -1)
    return chosen.reshape(shape), weights.reshape(shape).astype(np.float32)


def _windows(edge: int, stride: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """`[windows, places]` of an axis, and which of them lie on it; a window longer than the axis has no more places."""
    length = min(edge, stride)
    places = np.arange(0, edge, length)[:, None] + np.arange(length)
    return np.minimum(places, edge - 1), places < edge
