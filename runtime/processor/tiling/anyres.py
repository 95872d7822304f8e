"""AnyRes: a picture as a grid of tiles under a global view (LLaVA-NeXT, arXiv:2310.03744; LLaVA-OneVision, 2408.03326).

The features of the tiles are put together to one map, what lies on the border is left out, and every row of the map
ends with a newline: all of it is a choice of rows, made here from the picture's size alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ....errors import InputError
from ....image_contract import AnyRes, ImageContract, PadSquare, Whole
from ..image import FILTERS, preprocess_images
from ..picture import PictureTensors
from .interpolation import interpolate_rows

Rows = npt.NDArray[np.int64]
Size = tuple[int, int]

# Above this ratio of edges, a map with more features than `max_tiles` allows is interpolated down (OneVision).
DOWNSCALE_FROM = 1.1


@dataclass(frozen=True)
class Layout:
    """Where a picture of one size goes.

    grid: `(rows, columns)` of tiles. kept: slices of the feature map's rows and columns that the picture covers.
    scaled: `(height, width)` that the kept map is interpolated to; None where it stays.
    """

    grid: Size
    kept: tuple[slice, slice]
    scaled: Size | None

    @property
    def kept_size(self) -> Size:
        """`(height, width)` of the kept map."""
        height, width = (axis.stop - axis.start for axis in self.kept)
        return height, width


def prepare(image: Image.Image, contract: ImageContract, tiling: AnyRes) -> PictureTensors:
    """`pixel_values` `[1 + tiles, 3, H, W]`: the global view, then the tiles row by row.

    Raises InputError for a picture so thin that its interpolated features have no row or no column left.
    """
    layout = lay_out(image.size, tiling)
    rows, weights = token_rows(layout, tiling)
    return PictureTensors(
        tensors={"pixel_values": preprocess_images(cut(image, tiling), contract.steps)},
        pieces=(len(rows),),
        rows=rows,
        weights=weights,
    )


def single_tile(contract: ImageContract) -> ImageContract:
    """The contract for a picture that shares its prompt with others: one square tile, all features, a newline."""
    tiling = contract.tiling
    if not isinstance(tiling, AnyRes) or tiling.several is None:
        return contract
    steps = (PadSquare(color=tiling.several), *contract.steps)
    # Of one tile, the row after the last feature is the newline.
    return ImageContract(steps=steps, tiling=Whole(tokens=tiling.side**2 + 1))


def lay_out(size: Size, tiling: AnyRes) -> Layout:
    """The grid for a picture of `(width, height)` pixels and the features that stay of it."""
    best = best_grid(size, tiling.grids)
    grid = best[0] // tiling.tile, best[1] // tiling.tile
    kept = _kept(size, (grid[0] * tiling.side, grid[1] * tiling.side))
    layout = Layout(grid, kept, None)
    if tiling.max_tiles is None:
        return layout
    height, width = layout.kept_size
    ratio = math.sqrt(height * width / (tiling.max_tiles * tiling.side**2))
    if ratio <= DOWNSCALE_FROM:
        return layout
    scaled = int(height // ratio), int(width // ratio)
    if 0 in scaled:
        raise InputError(
            f"a picture of {size[0]}x{size[1]} is too thin: of its {height}x{width} features, interpolated to at most "
            f"{tiling.max_tiles} tiles, nothing is left; crop it to a less extreme shape"
        )
    return Layout(grid, kept, scaled)


def best_grid(size: Size, grids: tuple[Size, ...]) -> Size:
    """The `(height, width)` that shows most of a `(width, height)` picture, then the one that wastes least.

    The first of equals wins. transformers' `select_best_resolution`.
    """
    width, height = size

    def shown(grid: Size) -> int:
        scale = min(grid[1] / width, grid[0] / height)
        return min(int(width * scale) * int(height * scale), width * height)

    return max(grids, key=lambda grid: (shown(grid), shown(grid) - grid[0] * grid[1]))


def cut(image: Image.Image, tiling: AnyRes) -> list[Image.Image]:
    """The global view and the tiles, by rows, before `steps`."""
    height, width = best_grid(image.size, tiling.grids)
    resample = FILTERS[tiling.resample]
    fitted = image.resize(_fitted(image.size, (width, height)), resample)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    edge = tiling.tile
    tiles = [
        canvas.crop((left, top, left + edge, top + edge))
        for top in range(0, height, edge)
        for left in range(0, width, edge)
    ]
    return [image.resize((tiling.view, tiling.view), resample), *tiles]


def token_rows(layout: Layout, tiling: AnyRes) -> tuple[Rows, npt.NDArray[np.float32] | None]:
    """`rows` and `weights` of `PictureTensors`: the global view's features, then the map with its newlines.

    Row `(1 + tiles) * Q` is the newline. transformers' `pack_image_features`.
    """
    features = tiling.side**2
    map_rows = feature_map(layout.grid, tiling.side)[layout.kept]
    newline = (1 + layout.grid[0] * layout.grid[1]) * features
    view = np.arange(features, dtype=np.int64)
    if layout.scaled is None:
        ends = np.full((map_rows.shape[0], 1), newline, dtype=np.int64)
        return np.concatenate([view, np.hstack([map_rows, ends]).reshape(-1)]), None
    rows, weights = interpolate_rows(map_rows, layout.scaled)
    whole = np.array([1, 0, 0, 0], dtype=np.float32)
    ends = np.full((rows.shape[0], 1, 4), newline, dtype=np.int64)
    rows = np.concatenate([rows, ends], axis=1).reshape(-1, 4)
    weights = np.concatenate([weights, np.broadcast_to(whole, ends.shape)], axis=1).reshape(-1, 4)
    rows = np.concatenate([np.repeat(view[:, None], 4, axis=1), rows])
    return rows, np.concatenate([np.broadcast_to(whole, (features, 4)), weights])


def feature_map(grid: Size, side: int) -> Rows:
    """`[rows * side, columns * side]`: the row of the flattened features that each place of the joint map is.

    Tile 0 is the global view; the grid's tiles follow by rows.
    """
    rows, columns = grid
    numbers = np.arange(rows * columns * side * side, dtype=np.int64) + side * side
    return numbers.reshape(rows, columns, side, side).transpose(0, 2, 1, 3).reshape(rows * side, columns * side)


def _fitted(size: Size, target: Size) -> Size:
    """`(width, height)` as large as `target` allows, the aspect ratio kept, rounded up."""
    (width, height), (target_width, target_height) = size, target
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        return target_width, min(math.ceil(height * scale_width), target_height)
    return min(math.ceil(width * scale_height), target_width), target_height


def _kept(size: Size, map_size: Size) -> tuple[slice, slice]:
    """Rows and columns of a `(height, width)` feature map without the borders: transformers' `unpad_image`."""
    width, height = size
    rows, columns = map_size
    if width / height > columns / rows:
        # Rounded before it is cut, as there: a product that is whole but for its last bit stays whole.
        border = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(border, rows - border), slice(0, columns)
    border = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(border, columns - border)
