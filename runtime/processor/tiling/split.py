"""Idefics3 and SmolVLM: square tiles in rows, then the whole picture as one more tile.

Sizes and texts are those of transformers' `Idefics3ImageProcessorPil` and `Idefics3Processor`.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from ....image_contract import ImageContract, Split
from ..image import FILTERS, preprocess_image
from ..picture import PictureTensors

# No edge of a resized picture is longer, whatever the contract's longest_edge says.
MAX_EDGE = 4096


def prepare(image: Image.Image, contract: ImageContract, tiling: Split) -> PictureTensors:
    """`pixel_values` `[tiles, 3, S, S]` float32 and `pixel_attention_mask` `[tiles, S, S]` int64 (all ones).

    Tiles go row by row, the whole picture comes last; any size of at least 1x1 pixel is taken.
    """
    rows, columns, tiles = _cut(image, tiling)
    pixels = np.stack([preprocess_image(tile, contract.steps) for tile in tiles])
    return PictureTensors(
        tensors={
            "pixel_values": pixels,
            "pixel_attention_mask": np.ones((len(tiles), *pixels.shape[2:]), dtype=np.int64),
        },
        pieces=prompt_pieces(tiling, rows, columns),
        rows=np.arange(len(tiles) * tiling.tokens, dtype=np.int64),
    )


def _cut(image: Image.Image, tiling: Split) -> tuple[int, int, list[Image.Image]]:
    """Rows and columns of the grid (0 and 0 where there is none) and the tiles of `tile_size` squared pixels."""
    size, resample = tiling.tile_size, FILTERS[tiling.resample]
    image = image.resize(resized_size(image.width, image.height, tiling.longest_edge), resample)
    if not tiling.splitting:
        return 0, 0, [image.resize((size, size), resample)]
    image = image.resize(grid_size(image.width, image.height, size), resample)
    rows, columns = image.height // size, image.width // size
    if rows == columns == 1:
        return 0, 0, [image]
    corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
    tiles = [image.crop((left, top, left + size, top + size)) for left, top in corners]
    return rows, columns, [*tiles, image.resize((size, size), resample)]


def resized_size(width: int, height: int, longest_edge: int) -> tuple[int, int]:
    """(width, height) with the longer edge `longest_edge`, at most MAX_EDGE; the shorter one even, at least 1."""
    aspect = width / height
    if width >= height:
        width, height = longest_edge, _even(int(longest_edge / aspect))
    else:
        width, height = _even(int(longest_edge * aspect)), longest_edge
    # In two steps, as transformers does: the second starts from the rounded edges.
    width, height = max(width, 1), max(height, 1)
    aspect = width / height
    if width >= height and width > MAX_EDGE:
        width, height = MAX_EDGE, int(MAX_EDGE / aspect)
    elif height > width and height > MAX_EDGE:
        width, height = int(MAX_EDGE * aspect), MAX_EDGE
    return max(width, 1), max(height, 1)


def grid_size(width: int, height: int, tile_size: int) -> tuple[int, int]:
    """(width, height), each the next multiple of `tile_size`; the shorter one follows the longer one first."""
    aspect = width / height
    if width >= height:
        width = _multiple(width, tile_size)
        return width, _multiple(int(width / aspect), tile_size)
    height = _multiple(height, tile_size)
    return _multiple(int(height * aspect), tile_size), height


def prompt_pieces(tiling: Split, rows: int, columns: int) -> tuple[str | int, ...]:
    """What stands in the prompt for a picture of `rows` x `columns` tiles and its whole view (0 x 0: that alone)."""
    pieces: list[str | int] = []
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            tag = tiling.tile_tag.format(row=row, column=column)
            # A row after the first starts on the line that the row before it has ended.
            line = "\n" if column == 1 and row > 1 else ""
            pieces += [f"{line}{tiling.boundary}{tag}", tiling.tokens]
    line = "\n\n" if rows else ""
    return (*pieces, f"{line}{tiling.boundary}{tiling.global_tag}", tiling.tokens, tiling.boundary)


def _even(edge: int) -> int:
    return edge + edge % 2


def _multiple(edge: int, of: int) -> int:
    return math.ceil(edge / of) * of
