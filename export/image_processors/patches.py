"""Qwen2-VL's and Qwen2.5-VL's image processor: patches at the picture's own size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import CheckpointError, UnsupportedError
from ...image_contract import ImageContract, Patches
from .common import filter_name, number_steps, plain


def freeze(path: Path, processor: Any, config: Any, tokens: int | None = None) -> ImageContract:
    """The patches of `processor` and the windows of the vision tower; see `freeze_image_contract`.

    `tokens` has no meaning here: every picture has its own number. Raises CheckpointError where patches, groups or
    windows do not fit the vision tower, UnsupportedError for pictures that are not resized between two sizes.
    """
    size, vision = processor.size, config.vision_config
    if not (processor.do_resize and size and size.shortest_edge and size.longest_edge):
        raise UnsupportedError(
            f"{path}: the image processor has do_resize {processor.do_resize} and size {plain(size)}; accepted is a "
            "resize between shortest_edge and longest_edge pixels"
        )
    made = (processor.patch_size, processor.temporal_patch_size, processor.merge_size)
    want = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    if made != want:
        raise CheckpointError(
            f"{path}: patch_size, temporal_patch_size and merge_size of the image processor are {list(made)}, the "
            f"vision tower takes {list(want)}; set them to what vision_config says"
        )
    window: int | None = getattr(vision, "window_size", None)
    group = vision.patch_size * vision.spatial_merge_size
    if window is not None and window < group:
        raise CheckpointError(
            f"{path}: vision_config.window_size is {window}, under one group of {group} pixels; accepted is {group} "
            "or more"
        )
    tiling = Patches(
        patch_size=made[0],
        temporal_patch_size=made[1],
        merge_size=made[2],
        min_pixels=size.shortest_edge,
        max_pixels=size.longest_edge,
        resample=filter_name(path, processor.resample),
        window_size=window,
    )
    return ImageContract(steps=number_steps(path, processor), tiling=tiling)
