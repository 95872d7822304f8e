"""Freeze Idefics' processor: pictures between boundaries in the prompt, and which of them a token sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import CheckpointError, ExportError, UnsupportedError
from ..image_contract import Whole
from ..manifest import GenerationContract, ImageContract, PromptContract, TextSegment
from ..models.flamingo_contract import FlamingoContract
from ..models.idefics import flamingo_contract
from ..runtime.flamingo import visible_images
from ..runtime.processor import load_tokenizer as read_tokenizer
from ..runtime.processor import prepare_picture, tokenize_prompt
from .checkpoint_processor import image_token_text, load_processor, load_tokenizer
from .frozen import FrozenProcessor
from .image_processors import freeze_image_contract
from .picture_check import check_frozen_pictures
from .processor_check import PROMPTS, check_decode
from .tokenizer import freeze_tokenizer, placeholder_text

if TYPE_CHECKING:
    from ..models.checkpoint import VisionLanguageModel

# What IdeficsProcessor has in its code.
IMAGE_TOKEN = "<image>"
BOUNDARY = "<fake_token_around_image>"
_SPACE = " "

# Prompts that say where their pictures stand; " " between two of them is no text.
INTERLEAVED = (
    "{image}",
    "x {image} y {image}",
    "{image}{image}z",
    " a {image} {image}  b{image}",
    "one {image} two</s>three {image}",
    "{image} end</s>",
)


def freeze_flamingo(model: VisionLanguageModel) -> FlamingoContract:
    """How the language model reads pictures.

    Raises CheckpointError for a tokenizer that does not load, UnsupportedError for a connector that does not give the
    checkpoint's number of latents and is not reduced.
    """
    contract = flamingo_contract(model.config, load_tokenizer(model.path).eos_token_id)
    features = int(model.contracts["connector"].outputs[0].shape[1])
    if features != contract.latents and model.layout.reduction is None:
        raise UnsupportedError(
            f"{model.path}: the connector gives {features} features for a picture, the checkpoint has "
            f"{contract.latents} latents; Flamingo's cannot be replaced"
        )
    return contract.model_copy(update={"latents": features})


def freeze_idefics(model: VisionLanguageModel, directory: Path, generation: GenerationContract) -> FrozenProcessor:
    """The contracts of `model` with its `generation`, its tokenizer written into `directory`.

    Raises CheckpointError or UnsupportedError for what cannot be frozen, ExportError where it departs from the
    checkpoint's own processor.
    """
    processor = load_processor(model.path)
    latents: int = model.config.perceiver_config.resampler_n_latents
    image = freeze_image_contract(model.path, processor.image_processor, model.config, tokens=latents)
    # One word stands for a picture, whatever the number of its latents.
    image = image.model_copy(update={"tiling": Whole(tokens=latents, words=1, before=BOUNDARY, after=BOUNDARY)})
    prompt = freeze_idefics_prompt(model, processor)
    tokenizer = freeze_tokenizer(model.path, directory, prompt.image_token_id)
    check = _Check(processor, image, prompt, freeze_flamingo(model), read_tokenizer(tokenizer))
    return FrozenProcessor(image, prompt, generation, tokenizer, check.run(load_tokenizer(model.path)))


def freeze_idefics_prompt(model: VisionLanguageModel, processor: Any) -> PromptContract:
    """BOS, then texts and pictures in turn.

    Raises CheckpointError for a tokenizer without BOS or without the two words around pictures.
    """
    tokenizer = processor.tokenizer
    missing = [token for token in (IMAGE_TOKEN, BOUNDARY) if token not in tokenizer.get_vocab()]
    if missing or tokenizer.bos_token is None:
        raise CheckpointError(
            f"{model.path}: the tokenizer has no {missing[0] if missing else 'BOS token'}; copy the tokenizer files "
            "of the checkpoint again"
        )
    token_id: int = processor.image_token_id
    template = f"{tokenizer.bos_token}{{images}}{{prompt}}"
    return PromptContract(
        segments=(TextSegment(template=template, add_special_tokens=False),),
        text_only=(TextSegment(template=f"{tokenizer.bos_token}{{prompt}}", add_special_tokens=False),),
        boundary=BOUNDARY,
        boundary_gap="",
        strip=_SPACE,
        image_token_id=token_id,
        image_token=image_token_text(model.path, tokenizer, token_id),
        placeholder=placeholder_text(load_tokenizer(model.path)),
        images_per_prompt=flamingo_contract(model.config, None).max_images,
    )


@dataclass(frozen=True)
class _Check:
    """The frozen contracts against transformers' processor."""

    processor: Any
    image: ImageContract
    prompt: PromptContract
    flamingo: FlamingoContract
    tokenizer: Any

    def run(self, original: Any) -> dict[str, Any]:
        """Pixels, token ids, masks and texts; what was compared, for the manifest."""
        pictures = check_frozen_pictures(_NamedPixels(self.processor.image_processor), self.image)
        prompts = [(text, count, False) for text in PROMPTS for count in (0, 1, 2)]
        prompts += [(text, text.count("{image}"), True) for text in INTERLEAVED]
        for text, count, interleave in prompts:
            self._check_prompt(text, count, interleave=interleave)
        check_decode(original, self.tokenizer, self.prompt)
        return {**pictures, "prompts": len(prompts)}

    def _check_prompt(self, text: str, count: int, *, interleave: bool) -> None:
        blank = Image.new("RGB", (8, 8))
        pieces = [prepare_picture(blank, self.image).pieces] * count
        ours = tokenize_prompt(self.tokenizer, self.prompt, text, pieces, interleave=interleave)
        items = list(prompt_items(text, [blank] * count, interleave=interleave))
        theirs = self.processor(text=[items], return_tensors="pt")
        ids = [int(i) for i in theirs["input_ids"][0]]
        if ours.input_ids != ids:
            raise ExportError(
                f"tokenize: prompt {text[:40]!r} with {count} pictures gives {ours.input_ids[:24]}, transformers' "
                f"processor gives {ids[:24]}; the frozen prompt contract does not describe this checkpoint"
            )
        seen = visible_images(
            np.array(ids),
            max(1, count),
            image_token_id=self.prompt.image_token_id,
            end_of_document_id=self.flamingo.end_of_document_id,
        )
        if not np.array_equal(seen, theirs["image_attention_mask"][0].numpy()):
            raise ExportError(
                f"image_attention_mask: prompt {text[:40]!r} with {count} pictures has another one in transformers' "
                "processor; please report this checkpoint"
            )


def prompt_items(text: str, images: Sequence[Any], *, interleave: bool) -> Iterator[Any]:
    """What `IdeficsProcessor` takes for one prompt: texts and pictures in turn, no blank text between two pictures."""
    if not interleave:
        yield from images
        yield text
        return
    first, *parts = text.split("{image}")
    if first.strip(_SPACE):
        yield first
    for image, part in zip(images, parts, strict=True):
        yield image
        if part.strip(_SPACE):
            yield part


class _NamedPixels:
    """An image processor whose result has names, as those of other models have: Idefics' gives the bare array."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *images: Any, **options: Any) -> dict[str, Any]:
        return {"pixel_values": self._processor(*images, **options)}
