"""transformers' whole processor of a model that takes videos too, loaded for pictures and prompts alone.

Its video part needs torchvision and num2words, which a bundle's pictures do not; here it stands empty.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

# Where transformers looks for the processor's class, in this order.
_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "config.json")
# model_type -> class, for checkpoints whose files name none.
_PROCESSORS = {
    "internvl": "InternVLProcessor",
    "llava_next_video": "LlavaNextVideoProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "smolvlm": "SmolVLMProcessor",
}


class _NoVideo(dict[str, Any]):
    """What processors read of their video part while no video is there; a dict, as they print themselves as JSON."""

    model_input_names: tuple[str, ...] = ()
    num_frames = None
    fps = None


def takes_videos(path: Path) -> bool:
    """Whether the checkpoint's processor is one of those that have a video part."""
    return _class_name(path) in _PROCESSORS.values()


def load_without_video(path: Path, image_processor: Any, tokenizer: Any) -> Any:
    """The checkpoint's processor around these two parts; `takes_videos(path)` holds.

    Raises CheckpointError where its class is none with a video part, and what transformers raises for its files.
    """
    import transformers

    name = _class_name(path)
    if name is None or name not in _PROCESSORS.values():
        raise CheckpointError(
            f"{path}: the processor is {name or 'not named'}; accepted are {', '.join(sorted(_PROCESSORS.values()))}"
        )
    kind = without_video_check(getattr(transformers, name))
    settings, _ = kind.get_processor_dict(str(path), local_files_only=True)
    parts = {"image_processor": image_processor, "tokenizer": tokenizer, "video_processor": _NoVideo()}
    return kind.from_args_and_dict([parts[part] for part in kind.get_attributes()], settings)


def _class_name(path: Path) -> str | None:
    """The class that the files name, else the one of the model type; None where no file says it."""
    found: dict[str, Any] = {}
    for name in _FILES:
        with suppress(OSError, ValueError):
            settings: Any = json.loads((path / name).read_bytes())
            if isinstance(settings, dict):
                found = settings | found
    return found.get("processor_class") or _PROCESSORS.get(str(found.get("model_type")))


def without_video_check(kind: Any) -> Any:
    """`kind`, which takes what it gets for its video part."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else kind.check_argument_for_proper_class(self, name, argument)

    _give_num2words(kind)
    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


def _give_num2words(kind: Any) -> None:
    """SmolVLMProcessor does not start without it; it spells the number of frames of a video and nothing else."""
    module = sys.modules[kind.__module__]
    if getattr(module, "num2words", "") is None:
        vars(module)["num2words"] = str
