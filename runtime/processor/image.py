"""One tile to `pixel_values`, in the order and number types of transformers' Pillow-backed processors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ...errors import BundleError, InputError
from ...image_contract import CenterCrop, ImageStep, Normalize, PadSquare, Rescale, Resize, ResizeShortest

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

Array = npt.NDArray[Any]


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """Open a picture, turn it upright and make it RGB.

    `source`: a file that Pillow reads, or a Pillow picture. An EXIF orientation is applied, as transformers'
    `load_image` does; an animation gives its first frame; transparency lies on white and other modes
    (palette, CMYK, grey, 16 bit) become RGB, as transformers' image processors do.

    Raises InputError, one line, for what is no picture, cut off, empty, or larger than Pillow's limit
    `Image.MAX_IMAGE_PIXELS` (a file of some kilobytes can unpack to gigabytes).
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the picture")
    if not isinstance(source, str | Path):
        raise InputError(f"a picture is a {type(source).__name__}; accepted is a path or a Pillow picture")
    path = Path(source)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}; name a picture file")
    try:
        with warnings.catch_warnings():
            # Pillow warns from the limit on and raises from twice the limit on; here one limit holds.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _to_rgb(image, str(path))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{path} is larger than Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels, which guards against "
            "decompression bombs; make the picture smaller first"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a picture that Pillow can read; give a PNG, JPEG or the like") from error
    except PermissionError as error:
        raise InputError(f"{path} may not be read ({error.strerror}); change its permissions") from error
    except InputError:
        raise
    except Exception as error:
        raise _undecodable(str(path), error) from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Upright, RGB, first frame; `name` is for errors."""
    if image.width < 1 or image.height < 1:
        raise InputError(f"{name} has {image.width}x{image.height} pixels; it must have at least 1x1")
    try:
        upright = ImageOps.exif_transpose(image)
        if "A" in upright.getbands() or upright.info.get("transparency") is not None:
            rgba = upright.convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, rgba).convert("RGB")
        return upright.convert("RGB")
    except Exception as error:
        raise _undecodable(name, error) from error


def _undecodable(name: str, error: Exception) -> InputError:
    """Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more for a damaged file."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{name} cannot be decoded ({reason}): the file is cut off or damaged; copy it again")


def preprocess_image(image: Image.Image, steps: Sequence[ImageStep]) -> npt.NDArray[np.float32]:
    """`pixel_values` `[3, H, W]` float32 of one RGB tile (see `load_image`).

    Raises InputError for a picture so long that a step would make gigabytes of it, BundleError when `steps` resize,
    crop or pad after they have rescaled or normalised, which no processor does.
    """
    if image.mode != "RGB":
        image = load_image(image)
    pixels: Array | None = None
    for step in steps:
        if isinstance(step, Rescale | Normalize):
            pixels = _scale(step, channels_first(image) if pixels is None else pixels)
        elif pixels is None:
            image = _reshape(step, image)
        else:
            raise BundleError(f"the image contract has {step.op} after it rescales or normalises; export again")
    if pixels is None:
        pixels = channels_first(image)
    return np.ascontiguousarray(pixels, dtype=np.float32)


def preprocess_images(images: Sequence[Image.Image], steps: Sequence[ImageStep]) -> npt.NDArray[np.float32]:
    """`pixel_values` `[B, 3, H, W]` float32 of at least one RGB tile."""
    return np.stack([preprocess_image(image, steps) for image in images])


def channels_first(image: Image.Image) -> Array:
    """`[3, H, W]` uint8."""
    return np.moveaxis(np.asarray(image), -1, 0)


def _reshape(step: Resize | ResizeShortest | CenterCrop | PadSquare, image: Image.Image) -> Image.Image:
    """`step` on whole pixels, before any arithmetic."""
    if isinstance(step, Resize):
        return image.resize((step.width, step.height), FILTERS[step.resample])
    if isinstance(step, ResizeShortest):
        return _resize_shortest(step, image)
    if isinstance(step, PadSquare):
        return _pad_square(step, image)
    # Pillow's crop is black outside the picture; the floor of a negative half is transformers' own rounding.
    left, top = (image.width - step.width) // 2, (image.height - step.height) // 2
    return image.crop((left, top, left + step.width, top + step.height))


def _resize_shortest(step: ResizeShortest, image: Image.Image) -> Image.Image:
    short, long = sorted(image.size)
    longer = int(step.size * long / short)
    _check_pixels(image, longer * step.size, f"its shorter edge becomes {step.size}")
    size = (step.size, longer) if image.width <= image.height else (longer, step.size)
    return image.resize(size, FILTERS[step.resample])


def _pad_square(step: PadSquare, image: Image.Image) -> Image.Image:
    longer = max(image.size)
    if image.width == image.height:
        return image
    _check_pixels(image, longer * longer, "it is padded to a square")
    square = Image.new("RGB", (longer, longer), step.color)
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return square


def _check_pixels(image: Image.Image, pixels: int, why: str) -> None:
    """Raise InputError before memory is taken for a result above Pillow's own limit for a picture."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise InputError(
            f"a picture of {image.width}x{image.height} becomes {pixels} pixels where {why}; Pillow's limit of {limit} "
            "is accepted; crop the picture to a less extreme shape first"
        )


def _scale(step: Rescale | Normalize, pixels: Array) -> Array:
    if isinstance(step, Rescale):
        # In float64, then rounded once: transformers' `rescale`.
        return (pixels.astype(np.float64) * step.factor).astype(np.float32)
    # In float32, constants included: transformers' `normalize`.
    mean = np.array(step.mean, dtype=np.float32)[:, None, None]
    std = np.array(step.std, dtype=np.float32)[:, None, None]
    return (pixels.astype(np.float32) - mean) / std
