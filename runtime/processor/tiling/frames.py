"""A video as one tile per frame: LLaVA-NeXT-Video, LLaVA-OneVision, InstructBLIP-Video.

Frames come as pictures, or as an animated picture file; decoding films is left to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ....errors import InputError
from ....image_contract import Frames, ImageContract
from ..image import load_image, preprocess_images
from ..picture import PictureTensors
from .interpolation import interpolate_rows

# A video may unpack to this many times Pillow's limit for one picture.
PICTURE_LIMITS = 4

VideoSource = str | Path | Image.Image | Sequence["str | Path | Image.Image"]


def load_video(source: VideoSource, tiling: Frames) -> list[Image.Image]:
    """The frames that `tiling` takes, upright and RGB (see `load_image`).

    `source`: an animated GIF, WebP or PNG that Pillow reads (a file, or opened; also alone in a sequence), or a
    sequence of pictures.
    Raises InputError, one line, for no frames, fewer than are sampled, another count than the model takes, frames
    that do not decode, or more pixels in all than `PICTURE_LIMITS` times Pillow's limit.
    """
    if isinstance(source, str | Path):
        load_image(source)  # names what is wrong with the file
        with Image.open(source) as film:
            return _film_frames(film, tiling, str(source))
    if isinstance(source, Image.Image):
        return _film_frames(source, tiling, "the video")
    if not isinstance(source, Sequence):
        raise InputError(
            f"a video is a {type(source).__name__}; accepted is an animated picture, a directory of frames, or a list "
            "of pictures"
        )
    for frame in source:
        if not isinstance(frame, str | Path | Image.Image):
            raise InputError(f"a frame is a {type(frame).__name__}; accepted is a path or a Pillow picture")
    if len(source) == 1:  # a film, or a picture, which is a film of one frame
        return load_video(source[0], tiling)
    chosen = choose_frames(len(source), tiling)
    return [load_image(source[index]) for index in chosen]


def choose_frames(count: int, tiling: Frames) -> list[int]:
    """Numbers of the frames that are taken of `count`; raises InputError where the model takes no such video."""
    if count < 1:
        raise InputError("a video has 0 frames; give at least one picture")
    if tiling.sample is not None and count < tiling.sample:
        raise InputError(f"a video has {count} frames where {tiling.sample} are sampled; give at least that many")
    taken = count if tiling.sample is None else tiling.sample
    if tiling.frames is not None and taken != tiling.frames:
        raise InputError(f"a video has {taken} frames where the model takes exactly {tiling.frames}; give that many")
    return [index * count // taken for index in range(taken)]


def prepare(frames: Sequence[Image.Image], contract: ImageContract, tiling: Frames) -> PictureTensors:
    """`pixel_values` `[frames, 3, H, W]`; the frames' features in order, pooled, then the newline if there is one."""
    chosen = choose_frames(len(frames), tiling)
    rows, weights = token_rows(len(chosen), tiling)
    return PictureTensors(
        tensors={"pixel_values": preprocess_images([frames[index] for index in chosen], contract.steps)},
        pieces=(len(rows),),
        rows=rows,
        weights=weights,
    )


def token_rows(frames: int, tiling: Frames) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32] | None]:
    """`rows` and `weights` of `PictureTensors` for that many frames."""
    rows = np.arange(frames * tiling.tokens, dtype=np.int64)
    newline = np.array([frames * tiling.tokens] if tiling.newline else [], dtype=np.int64)
    if tiling.pool_stride == 1:
        return np.concatenate([rows, newline]), None
    side = math.isqrt(tiling.tokens)
    pooled = math.ceil(side / tiling.pool_stride)
    neighbours, weights = interpolate_rows(np.arange(side * side, dtype=np.int64).reshape(side, side), (pooled, pooled))
    first = np.arange(frames, dtype=np.int64)[:, None, None] * tiling.tokens
    taken = (neighbours.reshape(1, -1, 4) + first).reshape(-1, 4)
    shares = np.tile(weights.reshape(-1, 4), (frames, 1))
    ends = np.repeat(newline[:, None], 4, axis=1)
    whole = np.broadcast_to(np.array([1, 0, 0, 0], dtype=np.float32), ends.shape)
    return np.concatenate([taken, ends]), np.concatenate([shares, whole])


def _film_frames(film: Image.Image, tiling: Frames, name: str) -> list[Image.Image]:
    count = getattr(film, "n_frames", 1)
    chosen = choose_frames(count, tiling)
    limit = Image.MAX_IMAGE_PIXELS
    pixels = len(chosen) * film.width * film.height
    if limit is not None and pixels > PICTURE_LIMITS * limit:
        raise InputError(
            f"{name} unpacks to {pixels} pixels in {len(chosen)} frames; accepted are {PICTURE_LIMITS * limit} in all; "
            "give fewer or smaller frames"
        )
    frames = []
    for index in chosen:
        try:
            film.seek(index)
        except Exception as error:
            # Pillow's decoders raise EOFError, OSError, SyntaxError and more for a damaged file.
            raise InputError(f"{name}: frame {index} cannot be decoded; the file is damaged; copy it again") from error
        frames.append(load_image(film))
    return frames
