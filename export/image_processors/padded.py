"""Idefics2's image processor: pictures that keep their shape, padded and masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import CheckpointError, UnsupportedError
from ...image_contract import ImageContract, Padded
from .common import filter_name, number_steps, plain
from .counts import check_count, token_text


def freeze(path: Path, processor: Any, config: Any, tokens: int | None = None) -> ImageContract:
    """The limits of `processor`; see `freeze_image_contract`.

    Raises CheckpointError where a picture may be smaller than a patch, or its features are not counted alike;
    UnsupportedError for another resize, or pictures that are not padded.
    """
    size = processor.size
    if not (processor.do_resize and processor.do_pad and size and size.shortest_edge and size.longest_edge):
        raise UnsupportedError(
            f"{path}: the image processor has do_resize {processor.do_resize}, do_pad {processor.do_pad} and size "
            f"{plain(size)}; accepted is a resize within a shortest_edge and a longest_edge, then padding"
        )
    patch = config.vision_config.patch_size
    if size.shortest_edge < patch:
        raise CheckpointError(
            f"{path}: shortest_edge of the image processor is {size.shortest_edge}, under a patch of {patch} pixels; "
            f"set it to {patch} or more"
        )
    latents = config.perceiver_config.resampler_n_latents
    tiling = Padded(
        tokens=check_count(path, "image_seq_len", latents) if tokens is None else tokens,
        shortest_edge=size.shortest_edge,
        longest_edge=size.longest_edge,
        resample=filter_name(path, processor.resample),
        splitting=bool(processor.do_image_splitting),
        boundary=token_text(path, "image_boundary_token", Padded.model_fields["boundary"].default),
    )
    return ImageContract(steps=number_steps(path, processor), tiling=tiling)
