"""Hold a frozen image processor against the checkpoint's own: the same tensors of pictures of every shape and mode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import ExportError, InputError
from ..image_contract import ImageContract, Normalize, Rescale
from ..runtime.processor import load_image, prepare_picture

# The frozen steps do the processor's own operations in its own order and types, so they agree bit for bit on
# one machine; values lie within +-3, where FP32 steps are 2.4e-7, and a numpy built for another machine may
# round one operation differently. A wrong resampling filter moves these noise pictures by more than 0.1.
IMAGE_TOLERANCE = 1e-6

# (width, height): one pixel, odd ones in both directions, thin ones, and one of a usual photograph.
SIZES = ((1, 1), (37, 53), (201, 7), (3, 90), (331, 240))
MODES = ("RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "I;16")

# A step -> the processor's switch for it.
_SWITCHES = {
    "pad_square": "do_pad",
    "resize": "do_resize",
    "resize_shortest": "do_resize",
    "center_crop": "do_center_crop",
    "rescale": "do_rescale",
    "normalize": "do_normalize",
}


def check_frozen_pictures(image_processor: Any, contract: ImageContract) -> dict[str, Any]:
    """Run pictures of odd sizes and modes through both.

    `image_processor`: the checkpoint's own. Returns what was compared, for the manifest: `pictures`, `image_max_abs`.
    Raises ExportError naming the first step (tiling, resize, ..., normalize) that departs from transformers' own.
    """
    worst = 0.0
    pictures = list(sample_pictures())
    for name, picture in pictures:
        worst = max(worst, _check_picture(image_processor, contract, name, picture))
    return {"pictures": len(pictures), "image_max_abs": worst}


def sample_pictures() -> Iterator[tuple[str, Image.Image]]:
    """Noise (seeded): every filter and every rounding shows on it."""
    random = np.random.default_rng(0)
    for width, height in SIZES:
        noise = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8), mode="RGBA")
        for mode in MODES:
            if mode == "I;16":
                deep = random.integers(0, 65536, (height, width), dtype=np.uint16)
                yield f"{width}x{height} I;16", Image.fromarray(deep)
            else:
                yield f"{width}x{height} {mode}", _in_mode(noise, mode)


def _in_mode(noise: Image.Image, mode: str) -> Image.Image:
    if mode in ("P", "1", "CMYK", "L"):
        return noise.convert("RGB").convert(mode)
    return noise.convert(mode)


def _check_picture(image_processor: Any, contract: ImageContract, name: str, picture: Image.Image) -> float:
    """Max abs difference of the whole; on a difference, find the step."""
    upright = load_image(picture)
    # A processor that does not convert takes RGB pictures only; the run time always makes them RGB.
    source = picture if image_processor.do_convert_rgb else upright
    theirs, refused = _theirs(image_processor, source, {})
    try:
        ours = prepare_picture(upright, contract).tensors
    except InputError as error:
        if theirs is None:
            return 0.0
        raise ExportError(f"image processor: picture {name} is refused ({error}); transformers takes it") from error
    if theirs is None:
        raise ExportError(f"image processor: picture {name} is taken; transformers refuses it ({refused})")
    worst = _difference(theirs, ours)
    if worst <= IMAGE_TOLERANCE:
        return worst
    raise _first_departure(image_processor, contract, name, source, upright) or ExportError(
        f"image processor: picture {name} departs from transformers' by {worst:.3g} (accepted "
        f"{IMAGE_TOLERANCE:.0e}) though each frozen step agrees: a step is missing from the contract"
    )


def _first_departure(
    image_processor: Any, contract: ImageContract, name: str, source: Image.Image, upright: Image.Image
) -> ExportError | None:
    """The tiling, or the first step, after which the two differ; None where each agrees by itself."""
    for count in range(len(contract.steps) + 1):
        partial = contract.model_copy(update={"steps": contract.steps[:count]})
        theirs, _ = _theirs(image_processor, source, _switches(image_processor, contract, count))
        if theirs is None:  # a processor that takes no picture without this step
            continue
        departs = _difference(theirs, prepare_picture(upright, partial).tensors)
        if departs > IMAGE_TOLERANCE * _scale(partial):
            step = contract.steps[count - 1] if count else None
            what = f"tiling {contract.tiling.kind}" if step is None else f"step {step.op}"
            return ExportError(
                f"image processor: {what} of picture {name} departs from transformers' by {departs:.3g} (accepted "
                f"{IMAGE_TOLERANCE:.0e}); frozen is {(step or contract.tiling).model_dump()}"
            )
    return None


def _switches(image_processor: Any, contract: ImageContract, count: int) -> dict[str, bool]:
    """The processor's options that leave all but the first `count` steps out."""
    switches = {_SWITCHES[step.op] for step in contract.steps} | {"do_rescale", "do_normalize"}
    if contract.tiling.kind in ("whole", "anyres"):
        switches |= {"do_resize", "do_center_crop"}  # elsewhere they cut the tiles
    done = {_SWITCHES[step.op] for step in contract.steps[:count]}
    return {switch: switch in done for switch in switches if hasattr(image_processor, switch)}


def _theirs(image_processor: Any, source: Image.Image, options: dict[str, bool]) -> tuple[Any, str]:
    """The processor's tensors by name; None and the reason where it refuses the picture."""
    try:
        return image_processor(source, return_tensors="np", **options), ""
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        return None, " ".join(str(error).split())


def _difference(theirs: Any, ours: dict[str, npt.NDArray[Any]]) -> float:
    """Max abs difference of the tensors that both have; infinite where a shape differs."""
    worst = 0.0
    for name, mine in ours.items():
        if name not in theirs:
            continue
        other = np.asarray(theirs[name])
        # A batch of one picture has an axis more where the leading one counts tiles.
        other = other[0] if other.ndim == mine.ndim + 1 else other
        # The patches of Qwen2-VL stand in one axis there, in groups here.
        other = other.reshape(mine.shape) if other.ndim == mine.ndim - 1 and other.size == mine.size else other
        if other.shape != mine.shape:
            return math.inf
        worst = max(worst, float(np.abs(other.astype(np.float64) - mine).max(initial=0)))
    return worst


def _scale(contract: ImageContract) -> float:
    """Before the rescale step, values run to 255."""
    return 1.0 if any(isinstance(step, Rescale | Normalize) for step in contract.steps) else 255.0
