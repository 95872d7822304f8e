"""The picture's contract of a bundle whose connector gives another number of tokens than the checkpoint's processor
counts on: a reduced one, or a custom one."""

from __future__ import annotations

import math

from ..errors import UnsupportedError
from ..image_contract import AnyRes, Frames, ImageContract, Patches


def fit_tokens(image: ImageContract, tokens: int) -> ImageContract:
    """`image` with `tokens` features for every tile.

    Raises UnsupportedError where the tiling puts features back into a grid that so many do not form.
    """
    tiling = image.tiling
    if isinstance(tiling, Patches) or (isinstance(tiling, Frames) and tiling.pool_stride > 1):
        raise UnsupportedError(
            f"the tiling {tiling.kind} counts its tokens from the picture, and so its number stays; "
            "leave reduce-tokens out"
        )
    if not isinstance(tiling, AnyRes):
        return image.model_copy(update={"tiling": tiling.model_copy(update={"tokens": tokens})})
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UnsupportedError(
            f"{tokens} tokens form no square, which AnyRes puts back into the picture's grid; use pool:S"
        )
    return image.model_copy(update={"tiling": tiling.model_copy(update={"side": side})})
