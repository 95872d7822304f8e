"""Freeze what a checkpoint does to pictures and prompts into data that runs without transformers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ExportError, UnsupportedError
from ..manifest import (
    GenerationContract,
    ImageContract,
    ImageSegment,
    ImageStep,
    Normalize,
    PromptContract,
    Rescale,
    Resize,
    TextSegment,
)
from .checkpoint_processor import image_token_text, load_image_processor, load_processor, load_tokenizer
from .processor_check import check_frozen_processor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "check_frozen_processor",
    "freeze_generation",
    "freeze_image_processor",
    "freeze_prompt",
    "freeze_tokenizer",
]

# Pillow's numbers of its filters.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

# Processors that run transformers' common Pillow pipeline: resize, crop, rescale, normalise, pad.
_IMAGE_PROCESSORS = {
    "BlipImageProcessorPil",
    "CLIPImageProcessorPil",
    "DeiTImageProcessorPil",
    "SiglipImageProcessorPil",
    "ViTImageProcessorPil",
}


def freeze_image_processor(checkpoint: str | Path, config: Any = None) -> ImageContract:
    """What the checkpoint's image processor does to an RGB picture.

    `config`: the transformers config, to hold the size against the vision encoder's.
    Raises CheckpointError when there is no processor or it does not fit the model, UnsupportedError when it
    does what an ImageContract cannot say.
    """
    path = Path(checkpoint)
    processor = load_image_processor(path)
    _refuse_unsupported(path, processor)
    steps: list[ImageStep] = [
        Resize(
            height=processor.size.height,
            width=processor.size.width,
            resample=_filter_name(path, processor.resample),
        )
    ]
    if processor.do_rescale:
        steps.append(Rescale(factor=processor.rescale_factor))
    if processor.do_normalize:
        mean = _per_channel(path, "image_mean", processor.image_mean)
        std = _per_channel(path, "image_std", processor.image_std)
        if 0.0 in std:
            raise CheckpointError(f"{path}: image_std is {list(std)}; no channel may be 0")
        steps.append(Normalize(mean=mean, std=std))
    if config is not None:
        want = config.vision_config.image_size
        if (processor.size.height, processor.size.width) != (want, want):
            raise CheckpointError(
                f"{path}: the image processor makes {processor.size.height}x{processor.size.width} pictures, "
                f"the vision encoder takes {want}x{want}; set its size to what vision_config.image_size says"
            )
    return ImageContract(steps=tuple(steps))


def freeze_prompt(checkpoint: str | Path, config: Any) -> PromptContract:
    """Placeholders first, then the tokenised prompt with its BOS: what `Blip2Processor` does.

    Raises CheckpointError when the tokenizer has no image token or processor and config disagree.
    """
    path = Path(checkpoint)
    image_token = image_token_text(path, load_tokenizer(path), config.image_token_index)
    processor = load_processor(path)
    named = getattr(processor.image_token, "content", processor.image_token)
    if named != image_token:
        raise CheckpointError(
            f"{path}: the processor's image token is {named!r}, but token "
            f"{config.image_token_index} (image_token_index of config.json) is {image_token!r}; make them one"
        )
    if processor.num_query_tokens != config.num_query_tokens:
        raise CheckpointError(
            f"{path}: the processor has num_query_tokens {processor.num_query_tokens}, config.json has "
            f"{config.num_query_tokens}; set it in processor_config.json"
        )
    return PromptContract(
        segments=(ImageSegment(), TextSegment(add_special_tokens=True)),
        image_token_id=config.image_token_index,
        image_token=image_token,
        tokens_per_image=config.num_query_tokens,
    )


def freeze_tokenizer(checkpoint: str | Path, directory: str | Path, image_token_id: int) -> Path:
    """Write `tokenizer.json` into `directory` with the image token's text taken away; returns its path.

    Every other token keeps its id. The image token, if it is the last, is removed; else its text becomes one
    that nobody types by chance (removing it would shift the ids after it).

    Raises CheckpointError when the checkpoint has no tokenizer or that no image token, ExportError when the
    placeholder's text still becomes the image token.
    """
    from tokenizers import Tokenizer

    path = Path(checkpoint)
    tokenizer = load_tokenizer(path)
    image_token = image_token_text(path, tokenizer, image_token_id)
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["truncation"] = document["padding"] = None
    _neutralise(document, image_token_id)
    frozen = Tokenizer.from_str(json.dumps(document))
    _check_ids(frozen, tokenizer.backend_tokenizer, image_token, image_token_id)
    target = Path(directory) / "tokenizer.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return target


def freeze_generation(checkpoint: str | Path, config: Any) -> GenerationContract:
    """Stop tokens, padding and limits, as `Blip2ForConditionalGeneration.generate` of transformers has them.

    It hands over to the language model, whose settings come from `text_config`: the `generation_config.json`
    beside it is read by transformers and then not used (5.23), so it is not used here.
    """
    text = config.text_config
    eos = text.eos_token_id
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not all(isinstance(token, int) and 0 <= token < text.vocab_size for token in eos_ids):
        raise CheckpointError(
            f"{checkpoint}: text_config.eos_token_id {eos} is not in the vocabulary of {text.vocab_size}; correct it"
        )
    return GenerationContract(
        eos_token_ids=eos_ids,
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        context_length=text.max_position_embeddings,
        vocab_size=text.vocab_size,
    )


def _refuse_unsupported(path: Path, processor: Any) -> None:
    """Raise UnsupportedError for the first setting that an ImageContract cannot express."""
    name = type(processor).__name__
    if name not in _IMAGE_PROCESSORS:
        known = ", ".join(sorted(kind.removesuffix("Pil") for kind in _IMAGE_PROCESSORS))
        raise UnsupportedError(f"{path}: image processor {name.removesuffix('Pil')} is not built; built are {known}")
    size = processor.size
    exact = size is not None and size.height and size.width
    crop = processor.crop_size if processor.do_center_crop else None
    reasons = {
        "do_resize is false": not processor.do_resize,
        f"size {_plain(size)} keeps the aspect ratio": not exact,
        f"it crops to {_plain(crop)} after resizing": crop is not None
        and exact
        and (crop.height, crop.width) != (size.height, size.width),
        "do_pad is true": bool(getattr(processor, "do_pad", False)),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedError(
                f"{path}: the image processor is not one that a bundle can hold: {reason}; accepted is a "
                "resize to an exact height and width, then rescale and normalise"
            )


def _plain(size: Any) -> dict[str, int]:
    """A SizeDict's set entries."""
    return {key: value for key, value in dict(size or {}).items() if value is not None}


def _filter_name(path: Path, resample: Any) -> Any:
    if resample is None or int(resample) not in _FILTERS:
        raise CheckpointError(f"{path}: resample {resample!r} is unknown; known are {_FILTERS}")
    return _FILTERS[int(resample)]


def _per_channel(path: Path, name: str, value: Any) -> Any:
    values = tuple(float(v) for v in value) if isinstance(value, list | tuple) else (float(value),) * 3
    if len(values) != 3:
        raise CheckpointError(f"{path}: {name} has {len(values)} entries; RGB takes 3")
    return values


def _neutralise(document: dict[str, Any], image_token_id: int) -> None:
    """Take the image token's text out of a `tokenizer.json` document, in place."""
    added = document["added_tokens"]
    entry = next(entry for entry in added if entry["id"] == image_token_id)
    vocabulary = document["model"]["vocab"]
    in_model = isinstance(vocabulary, dict) and entry["content"] in vocabulary
    if image_token_id == max(other["id"] for other in added) and image_token_id >= len(vocabulary):
        added.remove(entry)
        return
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    text = f"<|image placeholder {digest}|>"
    if in_model:
        # A trainer puts its special tokens among the model's too; the id comes from there.
        vocabulary[text] = vocabulary.pop(entry["content"])
    entry["content"] = text


def _check_ids(frozen: Tokenizer, original: Tokenizer, image_token: str, image_token_id: int) -> None:
    """No other id has moved, and no text with the placeholder in it becomes the placeholder."""
    before = {i: token for token, i in original.get_vocab(with_added_tokens=True).items()}
    after = {i: token for token, i in frozen.get_vocab(with_added_tokens=True).items()}
    for token_id, token in before.items():
        if token_id != image_token_id and after.get(token_id) != token:
            raise ExportError(
                f"tokenizer: freezing it moved token {token_id} from {token!r} to {after.get(token_id)!r}; "
                f"give the image token {image_token!r} the last id"
            )
    for text in (image_token, f"a{image_token}b", f" {image_token} ", image_token * 3):
        if image_token_id in frozen.encode(text).ids:
            raise ExportError(
                f"tokenizer: the text {text!r} still becomes the image token {image_token_id}; "
                "the tokenizer's model holds it as an ordinary piece"
            )
