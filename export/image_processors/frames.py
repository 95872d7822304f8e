"""Video processors: a frame goes through the steps of a picture.

transformers' video processors run on torchvision alone, so they are read from their files, not loaded; their resize
rounds otherwise than Pillow's (two of 255 levels at most, 1e-4 on average after normalisation).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ...errors import CheckpointError, UnsupportedError
from ...image_contract import CenterCrop, Frames, ImageContract, ResizeShortest
from .common import check_size, feature_side, features_per_tile, fixed_size, number_steps, reshape_steps

# Where transformers looks for the settings, in this order; of the first they are the entry "video_processor".
FILES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")

_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
# transformers: `InstructBlipVideoProcessor` writes placeholders for 4 frames, whatever came.
_INSTRUCT_BLIP_FRAMES = 4


@dataclass(frozen=True)
class _VideoModel:
    """A model type: transformers' video processor, the defaults of that class, and what its frames become."""

    processor: str
    defaults: dict[str, Any]
    tiling: Callable[[Path, Any], Frames]


def freeze_video_contract(path: str | Path, config: Any) -> ImageContract:
    """What the checkpoint's video processor does to the RGB frames of a video.

    `config`: the transformers config. Raises CheckpointError when the checkpoint has no video processor or it does not
    fit the model, UnsupportedError for what an ImageContract cannot say.
    """
    path = Path(path)
    if config.model_type not in _MODELS:
        raise UnsupportedError(f"{path}: {config.model_type!r} takes no video; those that do are {', '.join(_MODELS)}")
    model = _MODELS[config.model_type]
    processor = read_video_processor(path, config.model_type)
    steps = reshape_steps(path, processor)
    _check_crop(path, steps)
    check_size(path, fixed_size(path, processor, steps), config)
    tiling = model.tiling(path, config).model_copy(update={"sample": _sampled(path, processor)})
    return ImageContract(steps=(*steps, *number_steps(path, processor)), tiling=tiling)


def read_video_processor(path: Path, model_type: str) -> Any:
    """The settings of the video processor by name, those of its class where the file leaves one out."""
    from transformers.image_processing_utils import get_size_dict
    from transformers.image_utils import SizeDict

    model = _MODELS[model_type]
    settings = _read_settings(path)
    named = settings.get("video_processor_type", model.processor)
    if named != model.processor:
        raise UnsupportedError(f"{path}: video processor {named} is not built; built is {model.processor}")
    settings = model.defaults | {name: value for name, value in settings.items() if value is not None}
    make_size: Any = get_size_dict
    for name in ("size", "crop_size"):
        given = settings.get(name)
        square = name == "crop_size" or settings.get("default_to_square", True)
        settings[name] = None if given is None else SizeDict(**make_size(given, default_to_square=square))
    return SimpleNamespace(**settings)


def _read_settings(path: Path) -> dict[str, Any]:
    for name in FILES:
        file = path / name
        if not file.is_file():
            continue
        try:
            settings: Any = json.loads(file.read_bytes())
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read as JSON ({error}); copy the checkpoint again") from error
        if name == FILES[0]:
            settings = settings.get("video_processor") if isinstance(settings, dict) else None
        if isinstance(settings, dict):
            return settings
    raise CheckpointError(f"{path} has no video processor (none of {', '.join(FILES)}); copy the whole checkpoint")


def _check_crop(path: Path, steps: tuple[Any, ...]) -> None:
    """Where a crop is wider than the resized frame, torchvision puts an odd border elsewhere than Pillow does."""
    edge = min((step.size for step in steps if isinstance(step, ResizeShortest)), default=None)
    for step in steps:
        if isinstance(step, CenterCrop) and edge is not None and max(step.height, step.width) > edge:
            raise UnsupportedError(
                f"{path}: the video processor crops {step.height}x{step.width} out of frames whose shorter edge is "
                f"{edge}; accepted are crops that fit"
            )


def _sampled(path: Path, processor: Any) -> int | None:
    """How many frames are taken; None for all."""
    if not getattr(processor, "do_sample_frames", False):
        return None
    count = getattr(processor, "num_frames", None)
    if getattr(processor, "fps", None) is not None or count is None:
        raise UnsupportedError(
            f"{path}: the video processor samples by fps, which needs the film's own; accepted is num_frames"
        )
    return int(count)


def _llava_next_video(path: Path, config: Any) -> Frames:
    """The connector pools before it projects."""
    side = _square_side(path, config)
    tokens = (side // config.spatial_pool_stride) ** 2
    # The processor divides by 4 whatever the stride is.
    if tokens != side * side // 4 or tokens < 1:
        raise UnsupportedError(
            f"{path}: frames of {side}x{side} patches, pooled with spatial_pool_stride {config.spatial_pool_stride}, "
            f"are {tokens} features where the processor writes {side * side // 4} placeholders; accepted is a stride "
            "of 2 over an even number of patches"
        )
    return Frames(tokens=tokens)


def _llava_onevision(path: Path, config: Any) -> Frames:
    """The projected features are interpolated to half the edge, rounded up."""
    return Frames(tokens=_square_side(path, config) ** 2, pool_stride=2, newline=True)


def _instruct_blip_video(path: Path, config: Any) -> Frames:
    return Frames(tokens=config.num_query_tokens, frames=_INSTRUCT_BLIP_FRAMES)


def _square_side(path: Path, config: Any) -> int:
    side, tokens = feature_side(config), features_per_tile(path, config)
    if tokens != side * side:
        raise UnsupportedError(
            f"{path}: a frame has {tokens} features where its patches are {side}x{side}; set "
            'vision_feature_select_strategy to "default" with a CLIP tower, to "full" with SigLIP'
        )
    return side


_MODELS: dict[str, _VideoModel] = {
    "llava_next_video": _VideoModel(
        "LlavaNextVideoVideoProcessor",
        _CLIP
        | {
            "size": {"shortest_edge": 224},
            "default_to_square": False,
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
        },
        _llava_next_video,
    ),
    "llava_onevision": _VideoModel(
        "LlavaOnevisionVideoProcessor",
        _CLIP | {"size": {"height": 384, "width": 384}, "default_to_square": False},
        _llava_onevision,
    ),
    "instructblipvideo": _VideoModel(
        "InstructBlipVideoVideoProcessor", _CLIP | {"size": {"height": 384, "width": 384}}, _instruct_blip_video
    ),
}
