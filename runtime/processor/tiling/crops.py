"""InternVL: the grid of tiles whose shape comes closest to the picture's, then the whole picture as a thumbnail.

Sizes and texts are those of transformers' `GotOcr2ImageProcessorPil` and `InternVLProcessor`.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from ....image_contract import Crops, ImageContract
from ..image import FILTERS, preprocess_image
from ..picture import PictureTensors


def prepare(image: Image.Image, contract: ImageContract, tiling: Crops) -> PictureTensors:
    """`pixel_values` `[tiles, 3, height, width]` float32: row by row, the thumbnail last; any size is taken."""
    tiles = _cut(image, tiling)
    return PictureTensors(
        tensors={"pixel_values": np.stack([preprocess_image(tile, contract.steps) for tile in tiles])},
        pieces=(tiling.before, len(tiles) * tiling.tokens, tiling.after),
        rows=np.arange(len(tiles) * tiling.tokens, dtype=np.int64),
    )


def choose_grid(width: int, height: int, tiling: Crops) -> tuple[int, int]:
    """(columns, rows) for a picture of `width` x `height` pixels.

    Of grids that are equally close the larger one wins, as long as it has less than twice the picture's pixels.
    """
    limit = range(1, tiling.max_tiles + 1)
    grids = [(c, r) for c in limit for r in limit if tiling.min_tiles <= c * r <= tiling.max_tiles]
    best, least = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        tile_pixels = tiling.height * tiling.width * columns * rows
        if difference < least or (difference == least and width * height > 0.5 * tile_pixels):
            best, least = (columns, rows), difference
    return best


def _cut(image: Image.Image, tiling: Crops) -> list[Image.Image]:
    columns, rows = choose_grid(image.width, image.height, tiling)
    width, height, resample = tiling.width, tiling.height, FILTERS[tiling.resample]
    canvas = image.resize((columns * width, rows * height), resample)
    corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
    tiles = [canvas.crop((left, top, left + width, top + height)) for left, top in corners]
    return tiles if len(tiles) == 1 else [*tiles, image.resize((width, height), resample)]
