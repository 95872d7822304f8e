"""InternVL's image processor (that of GOT-OCR2): a grid of tiles and a thumbnail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import CheckpointError, UnsupportedError
from ...image_contract import Crops, ImageContract
from .common import check_size, filter_name, number_steps, plain
from .counts import check_count, token_text


def freeze(path: Path, processor: Any, config: Any, tokens: int | None = None) -> ImageContract:
    """The grids and the tile of `processor`; see `freeze_image_contract`.

    Raises CheckpointError where the tiles are not what the vision encoder takes, their features are not counted alike,
    or there is no grid; UnsupportedError for a model other than InternVL, or without an exact size.
    """
    if config.model_type != "internvl":
        raise UnsupportedError(
            f"{path}: image processor GotOcr2ImageProcessor is built for internvl, this is a {config.model_type!r}"
        )
    size = processor.size
    if not (processor.do_resize and size and size.height and size.width):
        raise UnsupportedError(
            f"{path}: the image processor has do_resize {processor.do_resize} and size {plain(size)}; accepted is a "
            "resize to a height and width"
        )
    if not 1 <= processor.min_patches <= processor.max_patches:
        raise CheckpointError(
            f"{path}: min_patches is {processor.min_patches} and max_patches {processor.max_patches}; accepted is "
            "1 <= min_patches <= max_patches"
        )
    check_size(path, (size.height, size.width), config)
    # `crop_to_patches` does not count: InternVLProcessor always asks for it. It cuts for max_patches over 1.
    several = processor.max_patches > 1
    tiling = Crops(
        tokens=_count(path, config, (size.height, size.width)) if tokens is None else tokens,
        height=size.height,
        width=size.width,
        min_tiles=processor.min_patches if several else 1,
        max_tiles=processor.max_patches,
        resample=filter_name(path, processor.resample),
        before=token_text(path, "start_image_token"),
        after=token_text(path, "end_image_token"),
    )
    return ImageContract(steps=number_steps(path, processor), tiling=tiling)


def _count(path: Path, config: Any, size: tuple[int, int]) -> int:
    """The pixel shuffle makes `downsample_ratio` squared features of a patch."""
    patch = config.vision_config.patch_size
    edges = patch if isinstance(patch, list | tuple) else (patch, patch)
    patches = [edge // of for edge, of in zip(size, edges, strict=True)]
    count = patches[0] * patches[1] * config.downsample_ratio**2
    if count != int(count) or count != config.image_seq_length:
        raise CheckpointError(
            f"{path}: image_seq_length of config.json is {config.image_seq_length}, and a tile of {patches[0]}x"
            f"{patches[1]} patches with downsample_ratio {config.downsample_ratio} has {count:g} features; correct it"
        )
    return check_count(path, "image_seq_length", int(count))
