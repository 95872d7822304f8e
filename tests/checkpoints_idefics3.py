"""Small random checkpoints of Idefics3 and SmolVLM, as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.checkpoints import randomize, write_tokenizer
from tests.checkpoints_idefics2 import CHAT_TEMPLATE, SMALL_TEXT, SMALL_VISION

MAX_GRID = 6


def write_idefics3_checkpoint(
    directory: Path,
    *,
    smol: bool = False,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    scale_factor: int = 2,
    tie: bool = False,
    longest_edge: int | None = None,
    splitting: bool = True,
    seed: int = 0,
) -> Path:
    """`Idefics3ForConditionalGeneration`, or `SmolVLMForConditionalGeneration` with `smol`; returns `directory`."""
    import transformers as t
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    tokenizer = write_tokenizer(directory, text="llama")
    tags = [f"<row_{row}_col_{column}>" for row in range(1, MAX_GRID + 1) for column in range(1, MAX_GRID + 1)]
    marks = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tags]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    vision = {**SMALL_VISION, **(vision or {})}
    size = vision["image_size"]
    make_images: Any = SmolVLMImageProcessorPil if smol else Idefics3ImageProcessorPil
    images = make_images(
        size={"longest_edge": longest_edge or 2 * size},
        max_image_size={"longest_edge": size},
        do_image_splitting=splitting,
    )
    tokens = (size // vision["patch_size"]) ** 2 // scale_factor**2
    make_processor: Any = t.Idefics3Processor
    if smol:
        write_processor(directory, "SmolVLMProcessor", images, tokenizer, CHAT_TEMPLATE, image_seq_len=tokens)
    else:
        make_processor(images, tokenizer, image_seq_len=tokens, chat_template=CHAT_TEMPLATE).save_pretrained(directory)
    text = {**SMALL_TEXT, **(text or {}), "model_type": "llama", "vocab_size": len(tokenizer) + 3}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shared: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text | special,
        "scale_factor": scale_factor,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "tie_word_embeddings": tie,
    }
    model: Any = (
        t.SmolVLMForConditionalGeneration(t.SmolVLMConfig(**shared))
        if smol
        else t.Idefics3ForConditionalGeneration(t.Idefics3Config(**shared))
    )
    randomize(model, seed)
    model.save_pretrained(directory)
    return directory


def write_processor(directory: Path, kind: str, images: Any, tokenizer: Any, template: str, **settings: Any) -> None:
    """The files of a processor of transformers' class `kind` that has a video part, which needs torchvision to make."""
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(template)
    picture = images.to_dict()
    picture["image_processor_type"] = picture["image_processor_type"].removesuffix("Pil")
    config = {"processor_class": kind, "image_processor": picture, **settings}
    (directory / "processor_config.json").write_text(json.dumps(config, indent=2))
