"""Idefics3's and SmolVLM's image processor: square tiles and the whole picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import CheckpointError, UnsupportedError
from ...image_contract import ImageContract, Split
from .common import check_size, feature_side, filter_name, number_steps, plain
from .counts import check_count, token_text


def freeze(path: Path, processor: Any, config: Any, tokens: int | None = None) -> ImageContract:
    """The grid and the tile of `processor`; see `freeze_image_contract`.

    Raises CheckpointError where the tiles are not what the vision encoder takes, or their features are not counted
    alike; UnsupportedError for pictures that are not resized to a longest edge.
    """
    size = processor.size
    if not (processor.do_resize and size and size.longest_edge):
        raise UnsupportedError(
            f"{path}: the image processor has do_resize {processor.do_resize} and size {plain(size)}; accepted is a "
            "resize to a longest_edge"
        )
    tile = plain(processor.max_image_size).get("longest_edge", 0)
    check_size(path, (tile, tile), config)
    tiling = Split(
        tokens=_count(path, config) if tokens is None else tokens,
        longest_edge=size.longest_edge,
        tile_size=tile,
        resample=filter_name(path, processor.resample),
        splitting=bool(processor.do_image_splitting),
        boundary=_text(path, config, "boundary", "fake_image_token"),
        global_tag=_text(path, config, "global_tag", "global_image_token"),
    )
    return ImageContract(steps=number_steps(path, processor), tiling=tiling)


def _count(path: Path, config: Any) -> int:
    """The pixel shuffle makes one feature of `scale_factor` x `scale_factor` patches."""
    side, scale = feature_side(config), config.scale_factor
    if side % scale:
        raise CheckpointError(
            f"{path}: a tile has {side}x{side} patches, which scale_factor {scale} does not divide; correct "
            "image_size, patch_size or scale_factor of config.json"
        )
    return check_count(path, "image_seq_len", (side // scale) ** 2)


def _text(path: Path, config: Any, field: str, name: str) -> str:
    """SmolVLM's tokenizer may spell the marks in its own way; Idefics3's spelling is fixed."""
    default: str = Split.model_fields[field].default
    return token_text(path, name, default) if config.model_type == "smolvlm" else default
