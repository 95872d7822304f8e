"""LLaVA-NeXT's and LLaVA-OneVision's image processors: a global view and a grid of tiles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, UnsupportedError
from ...image_contract import AnyRes, CenterCrop, ImageContract, ImageStep, Resize, ResizeShortest
from .common import (
    Size,
    check_size,
    feature_side,
    features_per_tile,
    filter_name,
    mean_color,
    number_steps,
    plain,
    reshape_steps,
)

_ONEVISION = "LlavaOnevisionImageProcessorPil"


def freeze(path: Path, processor: Any, config: Any, tokens: int | None = None) -> ImageContract:
    """The grids, the tile and the view of `processor`, and what of the features stays; see `freeze_image_contract`.

    Raises CheckpointError where the processor's tiles or grids are not the model's, UnsupportedError for features that
    are no square (the class token kept), at which transformers fails too.
    """
    tile, view = _tile_edge(processor), _view_edge(path, processor)
    # `do_pad` is about the number of tiles in a batch, which a bundle does not pad.
    steps = reshape_steps(path, processor)
    made = _made(steps, (tile, tile))
    if made != _made(steps, (view, view)):
        raise CheckpointError(
            f"{path}: the image processor makes {made[0]}x{made[1]} pixels of a tile and another size of the global "
            f"view ({view}x{view} before its crop); give size and crop_size the same edge"
        )
    check_size(path, made, config)
    if tile != made[0]:
        raise CheckpointError(
            f"{path}: the image processor cuts tiles of {tile} pixels and the model counts tiles of {made[0]}; set "
            "crop_size to what vision_config.image_size says"
        )
    side, count = feature_side(config), features_per_tile(path, config) if tokens is None else tokens
    if count != side * side:
        raise UnsupportedError(
            f"{path}: a tile has {count} features where its patches are {side}x{side}; AnyRes lays out patches only, "
            'set vision_feature_select_strategy to "default" with a CLIP tower, to "full" with SigLIP'
        )
    onevision = type(processor).__name__ == _ONEVISION
    tiling = AnyRes(
        grids=_grids(path, processor, config, tile),
        tile=tile,
        view=view,
        side=side,
        resample=filter_name(path, processor.resample),
        max_tiles=_max_tiles(path, config) if onevision else None,
        several=mean_color(path, processor) if onevision else None,
    )
    return ImageContract(steps=(*steps, *number_steps(path, processor)), tiling=tiling)


def _tile_edge(processor: Any) -> int:
    """Where a tile is cut: `crop_size`, used or not, comes before `size`."""
    crop, size = processor.crop_size, processor.size
    edge: int = (crop.height if crop else None) or size.height or size.shortest_edge
    return edge


def _view_edge(path: Path, processor: Any) -> int:
    """The edge of the global view before its steps."""
    size = processor.size
    if size.height and size.width:
        if size.height != size.width:
            raise UnsupportedError(f"{path}: size {plain(size)} is no square; AnyRes takes square tiles")
        height: int = size.height
        return height
    if not size.shortest_edge:
        raise UnsupportedError(f"{path}: size {plain(size)} is not known to AnyRes; give height and width")
    shortest: int = size.shortest_edge
    return shortest


def _made(steps: tuple[ImageStep, ...], size: Size) -> Size:
    """The `(height, width)` that `steps` make of a square tile."""
    for step in steps:
        if isinstance(step, Resize | CenterCrop):
            size = step.height, step.width
        elif isinstance(step, ResizeShortest):
            size = step.size, step.size
    return size


def _grids(path: Path, processor: Any, config: Any, tile: int) -> tuple[Size, ...]:
    """`(height, width)` of every grid, in the order that settles ties."""
    grids = tuple((int(height), int(width)) for height, width in processor.image_grid_pinpoints)
    wanted = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    if grids != wanted:
        raise CheckpointError(
            f"{path}: image_grid_pinpoints of the image processor are {list(grids)[:6]}, those of config.json "
            f"{list(wanted)[:6]} ({len(grids)} and {len(wanted)} in all); make them one"
        )
    if not grids or any(edge < 1 or edge % tile for grid in grids for edge in grid):
        raise CheckpointError(
            f"{path}: image_grid_pinpoints are {list(grids)[:6]}; accepted are multiples of the tile, {tile} pixels"
        )
    return grids


def _max_tiles(path: Path, config: Any) -> int:
    """9 of "anyres_max_9"."""
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", str(config.vision_aspect_ratio))
    if found is None:
        raise UnsupportedError(
            f"{path}: vision_aspect_ratio is {config.vision_aspect_ratio!r}; accepted is anyres_max_N, say anyres_max_9"
        )
    return int(found[1])
