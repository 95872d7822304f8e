"""transformers' processor of InstructBLIP-Video, loaded without torchvision.

Its video processor does to every frame what the picture processor of the same settings does to a picture; that one,
run by Pillow and numpy, stands in for it (see image_processors/frames.py for how far the two are apart).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..models.remote_code import loader_options

MODEL_TYPE = "instructblipvideo"
INSTRUCTION_TOKENIZER = "qformer_tokenizer"


class FrameProcessor(dict[str, Any]):
    """`pixel_values` `[1, F, 3, H, W]` of the frames of one video; a dict, as processors print themselves as JSON."""

    model_input_names = ("pixel_values",)

    def __init__(self, pictures: Any) -> None:
        super().__init__()
        self.pictures = pictures

    def __call__(self, frames: Sequence[Image.Image], return_tensors: Any = None) -> dict[str, Any]:
        """`return_tensors` is the whole processor's business."""
        return {"pixel_values": self.pictures(list(frames), return_tensors="np")["pixel_values"][None]}


def takes_frames(path: Path) -> bool:
    """Whether the checkpoint at `path` is one of InstructBLIP-Video."""
    try:
        config: Any = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def load_for_frames(path: Path, tokenizer: Any) -> Any:
    """The checkpoint's processor; `image_processor` of it is what runs on each frame.

    Raises CheckpointError for a video processor that cannot be read, and what transformers raises for its files.
    """
    from transformers import AutoTokenizer, InstructBlipVideoProcessor

    from .image_processors.frames import read_video_processor
    from .processor_without_video import without_video_check

    pictures = _picture_processor(read_video_processor(path, MODEL_TYPE))
    make: Any = AutoTokenizer
    instruction = make.from_pretrained(path / INSTRUCTION_TOKENIZER, **loader_options())
    kind = without_video_check(InstructBlipVideoProcessor)
    settings, _ = kind.get_processor_dict(str(path), local_files_only=True)
    processor = kind.from_args_and_dict([FrameProcessor(pictures), tokenizer, instruction], settings)
    processor.image_processor = pictures
    return processor


def _picture_processor(settings: Any) -> Any:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    names = (
        "size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "do_resize", "do_center_crop",
        "do_rescale", "do_normalize",
    )  # fmt: skip
    make: Any = BlipImageProcessorPil
    return make(**{name: getattr(settings, name) for name in names if getattr(settings, name, None) is not None})
