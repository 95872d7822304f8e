"""Picture to `pixel_values`, in the order and number types of transformers' Pillow-backed processors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ...errors import BundleError, InputError
from ...manifest import ImageContract, ImageStep, Normalize, Rescale, Resize

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


def preprocess_image(image: Image.Image, contract: ImageContract) -> npt.NDArray[np.float32]:
    """`pixel_values` `[3, H, W]` float32 of one RGB picture (see `load_image`).

    Raises BundleError when the contract resizes after it has rescaled or normalised, which no processor does.
    """
    if image.mode != "RGB":
        image = load_image(image)
    pixels: Array | None = None
    for step in contract.steps:
        if isinstance(step, Resize):
            if pixels is not None:
                raise BundleError("the image contract resizes after it rescales or normalises; export again")
            image = image.resize((step.width, step.height), FILTERS[step.resample])
        else:
            pixels = _apply(step, _channels_first(image) if pixels is None else pixels)
    if pixels is None:
        pixels = _channels_first(image)
    return np.ascontiguousarray(pixels, dtype=np.float32)


def preprocess_images(images: Sequence[Image.Image], contract: ImageContract) -> npt.NDArray[np.float32]:
    """`pixel_values` `[B, 3, H, W]` float32 of at least one RGB picture."""
    return np.stack([preprocess_image(image, contract) for image in images])


def _channels_first(image: Image.Image) -> Array:
    """`[3, H, W]` uint8."""
    return np.moveaxis(np.asarray(image), -1, 0)


def _apply(step: ImageStep, pixels: Array) -> Array:
    if isinstance(step, Rescale):
        # In float64, then rounded once: transformers' `rescale`.
        return (pixels.astype(np.float64) * step.factor).astype(np.float32)
    if isinstance(step, Normalize):
        # In float32, constants included: transformers' `normalize`.
        mean = np.array(step.mean, dtype=np.float32)[:, None, None]
        std = np.array(step.std, dtype=np.float32)[:, None, None]
        return (pixels.astype(np.float32) - mean) / std
    raise BundleError(f"the image contract has the step {step.op!r}, which works on pictures only; export again")
