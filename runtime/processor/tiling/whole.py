"""The picture itself as one tile: BLIP-2, InstructBLIP, LLaVA, CLIP."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ....image_contract import ImageContract, Whole
from ..image import preprocess_image
from ..picture import PictureTensors


def prepare(image: Image.Image, contract: ImageContract, tiling: Whole) -> PictureTensors:
    """`pixel_values` `[1, 3, H, W]`; all the tile's features in order, between the tiling's texts."""
    pieces = (tiling.before, tiling.words or tiling.tokens, tiling.after)
    return PictureTensors(
        tensors={"pixel_values": preprocess_image(image, contract.steps)[None]},
        pieces=tuple(piece for piece in pieces if piece != ""),
        rows=np.arange(tiling.tokens, dtype=np.int64),
    )
