"""Processors that run transformers' common pipeline on one tile: resize, crop, rescale, normalise.

What they share with those that cut a picture into tiles is here too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, UnsupportedError
from ...image_contract import (
    CenterCrop,
    Filter,
    ImageContract,
    ImageStep,
    Normalize,
    PadSquare,
    Rescale,
    Resize,
    ResizeShortest,
    Whole,
)

# Pillow's numbers of its filters.
FILTERS: dict[int, Filter] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

# What `do_pad` means: here a square around the picture; elsewhere a batch brought to one size, which tiles have.
_PADS_TO_SQUARE = "LlavaImageProcessorPil"

Size = tuple[int, int]


def freeze(path: Path, processor: Any, config: Any, tokens: int | None = None) -> ImageContract:
    """The picture itself as one tile; see `freeze_image_contract`."""
    steps = (*_padding(path, processor), *reshape_steps(path, processor))
    check_size(path, fixed_size(path, processor, steps), config)
    count = features_per_tile(path, config) if tokens is None else tokens
    return ImageContract(steps=(*steps, *number_steps(path, processor)), tiling=Whole(tokens=count))


def _padding(path: Path, processor: Any) -> tuple[ImageStep, ...]:
    """`do_pad` before anything else; UnsupportedError where it is about a batch."""
    if not getattr(processor, "do_pad", False):
        return ()
    if type(processor).__name__ != _PADS_TO_SQUARE:
        raise _unsayable(path, "do_pad is true")
    return (PadSquare(color=mean_color(path, processor)),)


def reshape_steps(path: Path, processor: Any) -> tuple[ImageStep, ...]:
    """Resizing and cropping of `processor`, in its order; UnsupportedError for what no step says."""
    steps: list[ImageStep] = []
    if processor.do_resize:
        steps.append(resize_step(path, processor))
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    if crop is not None and not (crop.height and crop.width):
        raise _unsayable(path, f"crop_size {plain(crop)} has no height and width")
    if crop is not None and (not steps or _exact(steps[-1]) != (crop.height, crop.width)):
        steps.append(CenterCrop(height=crop.height, width=crop.width))
    return tuple(steps)


def resize_step(path: Path, processor: Any) -> Resize | ResizeShortest:
    """The resize to `processor.size`."""
    size, resample = processor.size, filter_name(path, processor.resample)
    # In the order in which transformers looks at them.
    if size is not None and size.shortest_edge and not size.longest_edge:
        return ResizeShortest(size=size.shortest_edge, resample=resample)
    if size is not None and size.height and size.width and not (size.shortest_edge or size.max_height):
        return Resize(height=size.height, width=size.width, resample=resample)
    raise _unsayable(path, f"size {plain(size)} keeps the aspect ratio")


def fixed_size(path: Path, processor: Any, steps: tuple[ImageStep, ...]) -> Size:
    """The one `(height, width)` that every picture gets; UnsupportedError where there is none."""
    made: Size | None = None
    square = False
    for step in steps:
        square = square or isinstance(step, PadSquare)
        if isinstance(step, ResizeShortest):
            made = (step.size, step.size) if square else None
        else:
            made = _exact(step) or made
    if made is None:
        kept = f"size {plain(processor.size)} keeps the aspect ratio"
        raise _unsayable(path, kept if processor.do_resize else "do_resize is false")
    return made


def number_steps(path: Path, processor: Any) -> tuple[ImageStep, ...]:
    """Rescale and normalise of `processor`; CheckpointError for values that are none of RGB."""
    steps: list[ImageStep] = []
    if processor.do_rescale:
        steps.append(Rescale(factor=processor.rescale_factor))
    if processor.do_normalize:
        mean = per_channel(path, "image_mean", processor.image_mean)
        std = per_channel(path, "image_std", processor.image_std)
        if 0.0 in std:
            raise CheckpointError(f"{path}: image_std is {list(std)}; no channel may be 0")
        steps.append(Normalize(mean=mean, std=std))
    return tuple(steps)


def check_size(path: Path, made: Size, config: Any) -> None:
    """Raise CheckpointError when the processor's tiles are not what the vision encoder takes."""
    want = config.vision_config.image_size
    height, width = want if isinstance(want, list | tuple) else (want, want)
    if made != (height, width):
        raise CheckpointError(
            f"{path}: the image processor makes {made[0]}x{made[1]} pictures, the vision encoder takes "
            f"{height}x{width}; set its size to what vision_config.image_size says"
        )


def features_per_tile(path: Path, config: Any) -> int:
    """How many features the connector makes of a tile: queries, or the patches that LLaVA selects.

    1 for models that make one embedding of a picture. Raises UnsupportedError for a vision tower whose tokens are not
    known.
    """
    from ...models.vision_tower import VISION_TOWERS, selects_patches_only

    if getattr(config, "num_query_tokens", None):
        queries: int = config.num_query_tokens
        return queries
    if not hasattr(config, "vision_feature_select_strategy"):
        return 1
    tower = config.vision_config.model_type
    if tower not in VISION_TOWERS:
        raise UnsupportedError(
            f"{path}: the vision tower is a {tower!r}; supported are {', '.join(sorted(VISION_TOWERS))}"
        )
    _, class_token = VISION_TOWERS[tower]
    return feature_side(config) ** 2 + class_token - selects_patches_only(config)


def feature_side(config: Any) -> int:
    """Patches along an edge of a tile."""
    side: int = config.vision_config.image_size // config.vision_config.patch_size
    return side


def filter_name(path: Path, resample: Any) -> Filter:
    """Pillow's name of the filter."""
    if resample is None or int(resample) not in FILTERS:
        raise CheckpointError(f"{path}: resample {resample!r} is unknown; known are {FILTERS}")
    return FILTERS[int(resample)]


def per_channel(path: Path, name: str, value: Any) -> tuple[float, float, float]:
    """One value per channel; a single number is for all three."""
    values = tuple(float(v) for v in value) if isinstance(value, list | tuple) else (float(value),) * 3
    if len(values) != 3:
        raise CheckpointError(f"{path}: {name} has {len(values)} entries; RGB takes 3")
    return values


def mean_color(path: Path, processor: Any) -> tuple[int, int, int]:
    """The color of padding, from `image_mean`: cut to an int, as transformers does."""
    if not processor.image_mean:
        return 0, 0, 0
    red, green, blue = (int(value * 255) for value in per_channel(path, "image_mean", processor.image_mean))
    return red, green, blue


def plain(size: Any) -> dict[str, int]:
    """A SizeDict's set entries."""
    entries: Iterable[tuple[str, Any]] = dict(size or {}).items()
    return {key: value for key, value in entries if value is not None}


def _exact(step: ImageStep) -> Size | None:
    return (step.height, step.width) if isinstance(step, Resize | CenterCrop) else None


def _unsayable(path: Path, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: the image processor is not one that a bundle can hold: {reason}; accepted are resizes and crops that "
        "end in one exact height and width, then rescale and normalise"
    )
