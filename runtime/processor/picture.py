"""A picture to the encoder's inputs and to what stands for it in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...errors import BundleError, InputError
from ...image_contract import Frames, ImageContract
from .image import load_image

# A tiling's kind -> the module that lays out such pictures: `prepare(image, contract, tiling) -> PictureTensors`.
TILINGS = {
    "whole": "whole",
    "anyres": "anyres",
    "split": "split",
    "padded": "padded",
    "crops": "crops",
    "patches": "patches",
    "frames": "frames",
}


@dataclass(frozen=True)
class PictureTensors:
    """One picture (or one video) ready for the encoder.

    tensors: the encoder's inputs by contract name; the leading axis counts tiles, or patches.
    pieces: what stands for it in the prompt: a str is literal text, an int is that many image tokens.
    rows: int64 `[T]` or `[T, K]`: for each image token, in order, the row or rows of the picture's features. Features
        are the connector's output `image_features` `[tiles, Q, D]` of this picture flattened to `[tiles * Q, D]`; if
        the connector has an output `image_newline` `[1, D]`, that is row `tiles * Q`.
    weights: None, or float32 `[T, K]`: the token is the weighted sum of those K rows (interpolation).
    video: whether it is a video beside pictures: its tokens are the prompt contract's video tokens.
    """

    tensors: dict[str, npt.NDArray[Any]]
    pieces: tuple[str | int, ...]
    rows: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32] | None = None
    video: bool = False


def load_picture(source: Any, contract: ImageContract) -> Image.Image | list[Image.Image]:
    """What `prepare_picture` takes: one RGB picture, or a video's frames where `contract` is about videos.

    `source`: a file or a Pillow picture; for a video also a sequence of those. Raises InputError for anything else.
    """
    if isinstance(contract.tiling, Frames):
        from .tiling.frames import load_video

        return load_video(source, contract.tiling)
    return load_image(source)


def prepare_picture(
    image: Image.Image | Sequence[Image.Image], contract: ImageContract, *, pictures: int = 1
) -> PictureTensors:
    """What `contract` makes of one RGB picture (see `load_image`), or of a video's frames (see `load_video`).

    `pictures`: how many the prompt holds; LLaVA-OneVision cuts a picture into tiles only where it is alone.
    Raises InputError for a picture whose shape the tiling cannot lay out, or a video where a picture is due and the
    other way round; BundleError for a tiling that this version does not know.
    """
    kind = contract.tiling.kind
    if kind not in TILINGS:
        raise BundleError(f"the image contract has the tiling {kind!r}; known are {', '.join(TILINGS)}; export again")
    if isinstance(image, Image.Image) == (kind == "frames"):
        came, due = ("a picture", "a video") if kind == "frames" else ("a sequence of pictures", "one picture")
        raise InputError(f"{came} came where the model takes {due}; give {due}")
    if kind == "anyres" and pictures > 1:
        from .tiling.anyres import single_tile

        contract = single_tile(contract)
        kind = contract.tiling.kind
    prepare: Callable[..., PictureTensors] = import_module(f".tiling.{TILINGS[kind]}", __package__).prepare
    return prepare(image, contract, contract.tiling)
