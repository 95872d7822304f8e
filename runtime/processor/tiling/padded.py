"""Idefics2: pictures of any shape; tiles are padded to the picture's largest, and a mask says what is picture.

Sizes and texts are those of transformers' `Idefics2ImageProcessorPil` and `Idefics2Processor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ....errors import InputError
from ....image_contract import ImageContract, Padded
from ..image import FILTERS, preprocess_image
from ..picture import PictureTensors


def prepare(image: Image.Image, contract: ImageContract, tiling: Padded) -> PictureTensors:
    """`pixel_values` `[tiles, 3, H, W]` float32, 0 outside the tile; `pixel_attention_mask` `[tiles, H, W]` int64.

    H and W are those of the picture's largest tile. No further padding: the last patch of an edge that is no multiple
    of the patch size would be seen then, and a picture's features depend on its company, as in transformers. Pictures
    of different sizes run apart (`runtime/vision.py`).

    Raises InputError for a picture under 2x2 pixels that is to be cut in quarters.
    """
    tiles = [*(_quarters(image) if tiling.splitting else ()), image]
    resample = FILTERS[tiling.resample]
    pixels = [preprocess_image(tile.resize(_resized_size(tile, tiling), resample), contract.steps) for tile in tiles]
    return PictureTensors(
        tensors=_pad(pixels),
        pieces=(*(tiling.boundary, tiling.tokens) * len(pixels), tiling.boundary),
        rows=np.arange(len(pixels) * tiling.tokens, dtype=np.int64),
    )


def _quarters(image: Image.Image) -> list[Image.Image]:
    """Upper left, upper right, lower left, lower right; odd pixels go to the right and below."""
    width, height = image.size
    if width < 2 or height < 2:
        raise InputError(
            f"the picture has {width}x{height} pixels; this model cuts it in quarters and takes 2x2 and larger: "
            "make it larger"
        )
    x, y = width // 2, height // 2
    boxes = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    return [image.crop(box) for box in boxes]


def _resized_size(image: Image.Image, tiling: Padded) -> tuple[int, int]:
    """(width, height): scaled down to `longest_edge`, then an edge under `shortest_edge` stretched to it."""
    width, height = image.size
    aspect = width / height
    if width >= height and width > tiling.longest_edge:
        width, height = tiling.longest_edge, int(tiling.longest_edge / aspect)
    elif height > width and height > tiling.longest_edge:
        width, height = int(tiling.longest_edge * aspect), tiling.longest_edge
    return max(width, tiling.shortest_edge), max(height, tiling.shortest_edge)


def _pad(tiles: Sequence[npt.NDArray[np.float32]]) -> dict[str, npt.NDArray[Any]]:
    """Tiles `[3, h, w]` in one array, with zeros below and to the right."""
    height = max(tile.shape[1] for tile in tiles)
    width = max(tile.shape[2] for tile in tiles)
    pixel_values = np.zeros((len(tiles), 3, height, width), dtype=np.float32)
    pixel_attention_mask = np.zeros((len(tiles), height, width), dtype=np.int64)
    for i, tile in enumerate(tiles):
        pixel_values[i, :, : tile.shape[1], : tile.shape[2]] = tile
        pixel_attention_mask[i, : tile.shape[1], : tile.shape[2]] = 1
    return {"pixel_values": pixel_values, "pixel_attention_mask": pixel_attention_mask}
