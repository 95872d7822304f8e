"""Freeze what a checkpoint's image processor does into an `ImageContract`: one module per way to lay out pictures."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError

if TYPE_CHECKING:
    from ...image_contract import ImageContract

# transformers' class -> the module that freezes it: `freeze(path, processor, config, tokens) -> ImageContract`.
IMAGE_PROCESSORS = {
    "BlipImageProcessorPil": "common",
    "CLIPImageProcessorPil": "common",
    "DeiTImageProcessorPil": "common",
    "GotOcr2ImageProcessorPil": "crops",
    "Idefics2ImageProcessorPil": "padded",
    "IdeficsImageProcessorPil": "common",
    "Idefics3ImageProcessorPil": "split",
    "LlavaImageProcessorPil": "common",
    "LlavaNextImageProcessorPil": "anyres",
    "LlavaOnevisionImageProcessorPil": "anyres",
    "Qwen2VLImageProcessorPil": "patches",
    "SiglipImageProcessorPil": "common",
    "SmolVLMImageProcessorPil": "split",
    "ViTImageProcessorPil": "common",
}


def freeze_image_contract(path: Path, processor: Any, config: Any, *, tokens: int | None = None) -> ImageContract:
    """What `processor`, an image processor of transformers, does to an RGB picture.

    `path`: the checkpoint, for errors. `config`: its transformers config. `tokens`: features of one tile, where they
    do not follow from `config` (see `common.features_per_tile`). Raises CheckpointError when processor and model do
    not fit each other, UnsupportedError for what an ImageContract cannot say.
    """
    name = type(processor).__name__
    if name not in IMAGE_PROCESSORS:
        known = ", ".join(sorted(kind.removesuffix("Pil") for kind in IMAGE_PROCESSORS))
        raise UnsupportedError(f"{path}: image processor {name.removesuffix('Pil')} is not built; built are {known}")
    module = import_module(f".{IMAGE_PROCESSORS[name]}", __package__)
    contract: ImageContract = module.freeze(path, processor, config, tokens)
    return contract
