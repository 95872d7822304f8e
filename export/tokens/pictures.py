"""What a picture of a given size becomes, by the run time's own tiling code; no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...errors import InputError
from ...image_contract import AnyRes, Frames, ImageContract
from ...runtime.processor.picture import PictureTensors, prepare_picture

# Frames of a video where the model leaves their number open.
DEFAULT_FRAMES = 8


@dataclass(frozen=True)
class Size:
    """A picture's `width` and `height` in pixels."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """ "672x336" is 672 wide. Raises InputError for anything else, for 0 and above Pillow's limit of pixels."""
        match = re.fullmatch(r"(\d+)[xX](\d+)", text.strip())
        if match is None:
            raise InputError(f"--image-size {text!r} is no size; give WIDTHxHEIGHT in pixels, say 672x336")
        size = cls(int(match[1]), int(match[2]))
        if not size.width or not size.height:
            raise InputError(f"--image-size {text!r} is an empty picture; both edges must be 1 or more")
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and size.width * size.height > limit:
            raise InputError(
                f"--image-size {text!r} has more pixels than Pillow's limit of {limit}; give a smaller one"
            )
        return size

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class PreparedPicture:
    """A picture laid out: the encoder's inputs, `tiles` of them, and its `tokens` in the prompt.

    `tiles`: 1 for a picture that is read whole, of any size. `marks`: texts around the tokens.
    """

    tensors: dict[str, npt.NDArray[Any]]
    tiles: int
    tokens: int
    marks: tuple[str, ...]


def lay_out(size: Size, image: ImageContract) -> PreparedPicture:
    """A grey picture of `size` through `image`; a video's frames are all of that size.

    Raises InputError for a shape that the tiling does not take.
    """
    picture = Image.new("RGB", (size.width, size.height), (128, 128, 128))
    tiling = image.tiling
    if isinstance(tiling, Frames):
        frames = tiling.frames or tiling.sample or DEFAULT_FRAMES
        prepared = prepare_picture([picture] * frames, image)
    else:
        prepared = prepare_picture(picture, image)
    return PreparedPicture(
        tensors=prepared.tensors,
        tiles=_tiles(prepared, image),
        tokens=sum(piece for piece in prepared.pieces if isinstance(piece, int)),
        marks=tuple(piece for piece in prepared.pieces if isinstance(piece, str)),
    )


def count_marks(marks: tuple[str, ...], tokenizer: Path) -> int:
    """Tokens of the texts around the image tokens, by a tokenizer.json."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer)).encode
    return sum(len(encode(mark, add_special_tokens=False).ids) for mark in marks)


def packs_features(image: ImageContract) -> bool:
    """Whether the run time leaves features out (borders) and adds some (newlines) before the prompt."""
    return isinstance(image.tiling, AnyRes)


def _tiles(prepared: PictureTensors, image: ImageContract) -> int:
    return 1 if image.tiling.kind == "patches" else int(np.shape(prepared.tensors["pixel_values"])[0])
