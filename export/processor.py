"""Freeze what a checkpoint does to pictures and prompts into data that runs without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UnsupportedError
from ..image_contract import Padded
from ..manifest import (
    GenerationContract,
    ImageContract,
    PromptContract,
)
from .checkpoint_processor import load_image_processor
from .frozen import FrozenProcessor
from .idefics_processor import freeze_idefics
from .image_processors import freeze_image_contract
from .image_processors.frames import freeze_video_contract
from .instruction import freeze_instruction
from .processor_check import check_frozen_processor
from .processor_of_frames import takes_frames
from .prompts import freeze_blip2_prompt, freeze_chat_prompt
from .tokenizer import freeze_tokenizer
from .video import VIDEO_KINDS, FrozenVideo, check_frozen_video, freeze_video

if TYPE_CHECKING:
    from ..models.checkpoint import VisionLanguageModel

__all__ = [
    "check_frozen_processor",
    "freeze_generation",
    "freeze_image_processor",
    "freeze_processor",
    "freeze_prompt",
    "freeze_tokenizer",
]


# Pictures before the prompt, no chat template, and a `generate` that hands over to the language model's.
_BLIP_KINDS = ("blip-2", "instructblip", "instructblip-video")


def freeze_processor(model: VisionLanguageModel, directory: Path) -> FrozenProcessor:
    """All contracts of `model`, its tokenizer written into `directory`, held against the checkpoint's own processor.

    Raises CheckpointError or UnsupportedError for what cannot be frozen, ExportError where it departs.
    """
    if model.kind == "flamingo":
        return freeze_idefics(model, directory, freeze_generation(model))
    image = freeze_image_processor(model.path, model.config)
    prompt = freeze_prompt(model)
    if isinstance(image.tiling, Padded):
        prompt = prompt.model_copy(update={"boundary": image.tiling.boundary})
    video, missing = _freeze_video(model, prompt)
    if video is not None:
        prompt = prompt.model_copy(update={"video": video.placeholder})
    video_token = None if video is None else video.placeholder.token_id
    tokenizer = freeze_tokenizer(model.path, directory, prompt.image_token_id, video_token)
    if model.kind in ("instructblip", "instructblip-video"):
        instruction = freeze_instruction(model.path, model.config, tokenizer)
        prompt = prompt.model_copy(update={"instruction": instruction})
    checks = check_frozen_processor(model.path, image, prompt, tokenizer)
    if video is not None:
        checks["video"] = check_frozen_video(model.path, model.config, image, video.contract, prompt, tokenizer)
    elif missing:
        checks["video"] = {"not_built": missing}
    contract = None if video is None else video.contract
    return FrozenProcessor(image, prompt, freeze_generation(model), tokenizer, checks, contract)


def _freeze_video(model: VisionLanguageModel, prompt: PromptContract) -> tuple[FrozenVideo | None, str]:
    """What is frozen of videos; where that is nothing though the model takes some, why: it still takes pictures."""
    if model.kind not in VIDEO_KINDS:
        return None, ""
    try:
        return freeze_video(model, prompt), ""
    except UnsupportedError as error:
        return None, str(error)


def freeze_image_processor(checkpoint: str | Path, config: Any) -> ImageContract:
    """What the checkpoint's image processor does to an RGB picture, or its video processor to the frames of a video.

    `config`: the transformers config. Raises CheckpointError when there is no processor or it does not fit the model,
    UnsupportedError when it does what an ImageContract cannot say.
    """
    path = Path(checkpoint)
    if takes_frames(path):
        return freeze_video_contract(path, config)
    return freeze_image_contract(path, load_image_processor(path), config)


def freeze_prompt(model: VisionLanguageModel) -> PromptContract:
    """How the checkpoint lays out pictures and prompt; see `prompts`."""
    freeze = freeze_blip2_prompt if model.kind in _BLIP_KINDS else freeze_chat_prompt
    return freeze(model.path, model.config)


def freeze_generation(model: VisionLanguageModel) -> GenerationContract:
    """Stop tokens, padding and limits, as transformers' `generate` has them.

    Those of generation_config.json; but the models of BLIP-2's kind hand over to the language model, whose settings
    come from `text_config`: transformers reads the file beside it and then does not use it (5.23).
    """
    text = model.text_config
    settings = {} if model.kind in _BLIP_KINDS else _generation_config(model.path)
    eos = settings.get("eos_token_id", text.eos_token_id)
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not all(isinstance(token, int) and 0 <= token < text.vocab_size for token in eos_ids):
        raise CheckpointError(
            f"{model.path}: eos_token_id {eos} is not in the vocabulary of {text.vocab_size}; correct it"
        )
    return GenerationContract(
        eos_token_ids=eos_ids,
        pad_token_id=settings.get("pad_token_id", text.pad_token_id),
        bos_token_id=settings.get("bos_token_id", getattr(text, "bos_token_id", None)),
        context_length=model.contracts["embed_tokens"].axis("sequence").max,
        vocab_size=text.vocab_size,
    )


def _generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json, where there is one."""
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        settings: dict[str, Any] = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); copy the checkpoint again") from error
    return settings
