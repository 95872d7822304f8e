"""The picture's contract of a bundle in which a picture has another number of tokens than the checkpoint's processor
counts on: of a reduced connector, or of a custom one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import UnsupportedError
from ..image_contract import AnyRes, Frames, ImageContract, Patches

if TYPE_CHECKING:
    from ..models.stages import Layout


def fit_layout(image: ImageContract, layout: Layout) -> ImageContract:
    """`image` with the tokens that the connector of `layout` gives. Raises UnsupportedError as `fit_tokens`."""
    if layout.reduction is None and layout.custom_connector is None:
        return image
    tokens = layout.contracts["connector"].outputs[0].shape[1]
    tiling, reduction = image.tiling, layout.reduction
    if isinstance(tiling, Patches) and isinstance(tokens, str) and reduction is not None and reduction.method == "pool":
        return image.model_copy(update={"tiling": tiling.model_copy(update={"pool_stride": reduction.amount})})
    return fit_tokens(image, int(tokens))


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
