"""Qwen2-VL and Qwen2.5-VL: the picture at its own size as flattened patches, and where each of them lies.

Sizes and orders are those of transformers' `Qwen2VLImageProcessorPil` and of `transformers.vision_utils`; there all
patches stand in one axis, here those of a group, which becomes one token, have an axis of their own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ....errors import InputError
from ....image_contract import ImageContract, Patches
from ..image import FILTERS, preprocess_image
from ..picture import PictureTensors
from .pooling import pool_rows

# A longer strip is refused by transformers as well: one edge would be all padding.
MAX_ASPECT_RATIO = 200

Array = npt.NDArray[Any]


def prepare(image: Image.Image, contract: ImageContract, tiling: Patches) -> PictureTensors:
    """One picture's patches in G groups of M = `merge_size` squared, and what the vision tower must know of them.

    `pixel_values` `[G, M, 3*T*P*P]` float32, groups row by row; `rotary_position_ids` `[G, M, 2]` int64: row and column
    of each patch; `image_grid_thw` `[1, 3]` int64: 1, rows and columns of patches (for the positions in the language
    model, no input of the encoder). With windows also `window_index` `[G]` int64 (groups in window order),
    `inverse_window_index` `[G]` int64 (where each group stands in it), `window_ids` `[G, M]` int64 (window of each
    patch, in window order) and `token_windows` `[G]` int64 (window of each group, in the picture's order).

    Raises InputError for a picture more than 200 times as long as wide.
    """
    size = smart_resize(image.width, image.height, tiling)
    pixels = preprocess_image(image.resize(size, FILTERS[tiling.resample]), contract.steps)
    rows, columns = size[1] // tiling.patch_size, size[0] // tiling.patch_size
    tensors: dict[str, Array] = {
        "pixel_values": _flatten(pixels, tiling),
        "rotary_position_ids": rotary_position_ids(rows, columns, tiling.merge_size),
        "image_grid_thw": np.array([[1, rows, columns]], dtype=np.int64),
    }
    if tiling.window_size is not None:
        index, ids = window_order(rows, columns, tiling)
        inverse = np.argsort(index)
        tensors |= {"window_index": index, "inverse_window_index": inverse, "window_ids": ids}
        tensors["token_windows"] = np.ascontiguousarray(ids[inverse, 0])
    chosen, weights = token_rows((rows // tiling.merge_size, columns // tiling.merge_size), tiling.pool_stride)
    return PictureTensors(tensors=tensors, pieces=(len(chosen),), rows=chosen, weights=weights)


def token_rows(grid: tuple[int, int], pool_stride: int) -> tuple[Array, npt.NDArray[np.float32] | None]:
    """`rows` and `weights` of `PictureTensors` for `grid` (height, width in groups): all, or the means of windows."""
    numbers = np.arange(grid[0] * grid[1], dtype=np.int64)
    if pool_stride == 1:
        return numbers, None
    rows, weights = pool_rows(numbers.reshape(grid), pool_stride)
    return rows.reshape(-1, rows.shape[-1]), weights.reshape(-1, rows.shape[-1])


def smart_resize(width: int, height: int, tiling: Patches) -> tuple[int, int]:
    """(width, height), multiples of a group's edge, with `min_pixels` to `max_pixels`, near the picture's shape."""
    ratio = max(width, height) / min(width, height)
    if ratio > MAX_ASPECT_RATIO:
        raise InputError(
            f"the picture has {width}x{height} pixels, an aspect ratio of {ratio:.0f}; accepted is up to "
            f"{MAX_ASPECT_RATIO}: crop it or cut it in parts"
        )
    edge = tiling.patch_size * tiling.merge_size
    # Python rounds halves to even, as transformers' smart_resize does.
    new_width, new_height = round(width / edge) * edge, round(height / edge) * edge
    if new_width * new_height > tiling.max_pixels:
        shrink = math.sqrt(width * height / tiling.max_pixels)
        new_width = max(edge, math.floor(width / shrink / edge) * edge)
        new_height = max(edge, math.floor(height / shrink / edge) * edge)
    elif new_width * new_height < tiling.min_pixels:
        grow = math.sqrt(tiling.min_pixels / (width * height))
        new_width = math.ceil(width * grow / edge) * edge
        new_height = math.ceil(height * grow / edge) * edge
    return new_width, new_height


def rotary_position_ids(rows: int, columns: int, merge_size: int) -> Array:
    """`[G, M, 2]` int64: row and column of every patch, in the order of `pixel_values`."""
    places = np.indices((rows, columns), dtype=np.int64)
    blocks = places.reshape(2, rows // merge_size, merge_size, columns // merge_size, merge_size)
    return np.ascontiguousarray(blocks.transpose(1, 3, 2, 4, 0).reshape(-1, merge_size**2, 2))


def window_order(rows: int, columns: int, tiling: Patches) -> tuple[Array, Array]:
    """`window_index` `[G]` and `window_ids` `[G, M]`, int64, for a picture of `rows` x `columns` patches.

    A window holds a square of groups, less at the right and lower edge; windows go row by row, and so do the groups
    within one.
    """
    if tiling.window_size is None:
        raise ValueError("these patches have no windows")
    edge = tiling.window_size // tiling.merge_size // tiling.patch_size
    across, merge = columns // tiling.merge_size, tiling.merge_size
    row, column = np.indices((rows // merge, across), dtype=np.int64).reshape(2, -1)
    windows = row // edge * math.ceil(across / edge) + column // edge
    index = np.argsort(windows, kind="stable").astype(np.int64)
    return index, np.repeat(windows[index][:, None], merge**2, axis=1)


def _flatten(pixels: Array, tiling: Patches) -> Array:
    """`[G, M, 3*T*P*P]` of a picture `[3, H, W]`, which stands for all T frames of its patches."""
    patch, merge = tiling.patch_size, tiling.merge_size
    channels, height, width = pixels.shape
    blocks = pixels.reshape(
        channels, height // patch // merge, merge, patch, width // patch // merge, merge, patch
    ).transpose(1, 4, 2, 5, 0, 3, 6)
    frames = np.broadcast_to(blocks[..., None, :, :], (*blocks.shape[:5], tiling.temporal_patch_size, patch, patch))
    values = channels * tiling.temporal_patch_size * patch * patch
    return np.ascontiguousarray(frames.reshape(-1, merge**2, values))
