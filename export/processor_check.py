"""Hold the frozen processor against the checkpoint's own: same pixels, same token ids, same text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ExportError
from ..image_contract import Frames, Whole
from ..manifest import ImageContract, PromptContract
from ..runtime.processor import (
    decode,
    load_tokenizer,
    prepare_picture,
    tokenize_prompt,
)
from ..runtime.processor.instruction import InstructionTokenizer
from .checkpoint_processor import load_processor, quiet_transformers
from .checkpoint_processor import load_tokenizer as load_checkpoint_tokenizer
from .picture_check import check_frozen_pictures
from .prompts import render_turn

PROMPTS = (
    "",
    " ",
    "a",
    "Question: what is this? Answer:",
    "  two  spaces, a tab\tand a\nnewline ",
    "Z\u00fcrich, \u6771\u4eac, \u0646, \U0001f642\U0001f3fd e\u0301",
    "braces {prompt} {0} % $x",
    "</s> <s> <pad> <|endoftext|>",
    "word " * 200,
)


def check_frozen_processor(
    checkpoint: str | Path, image: ImageContract, prompt: PromptContract, tokenizer: str | Path
) -> dict[str, Any]:
    """Run pictures of odd sizes and modes and several prompts through both processors.

    `tokenizer`: the frozen tokenizer.json. Returns what was compared, for the manifest: `pictures`,
    `prompts`, `image_max_abs`. Raises ExportError naming the first step (tiling, resize, rescale,
    normalize, tokenize, decode) that departs from transformers' own.
    """
    processor = load_processor(Path(checkpoint))
    pictures = check_frozen_pictures(processor.image_processor, _frame_by_frame(image))
    frozen = load_tokenizer(tokenizer)
    original = load_checkpoint_tokenizer(Path(checkpoint))
    with quiet_transformers():  # it remarks on long prompts
        for text in PROMPTS:
            _check_prompt(processor, frozen, image, prompt, text)
        check_decode(original, frozen, prompt)
    if prompt.instruction is not None:
        file = Path(tokenizer).with_name(Path(prompt.instruction.tokenizer).name)
        _check_instructions(processor, InstructionTokenizer(file, prompt.instruction))
    return {**pictures, "prompts": len(PROMPTS)}


def _check_prompt(processor: Any, frozen: Any, image: ImageContract, contract: PromptContract, text: str) -> None:
    """Ids and placeholders with one picture, and, where the contract takes that, with two and with none."""
    for count in (1, *((0,) if contract.text_only else ()), *((2,) if contract.images_per_prompt > 1 else ())):
        blank = _blank(image)
        pictures = [prepare_picture(blank, image, pictures=count).pieces] * count
        theirs = _their_ids(processor, contract, text, [blank] * count)
        ours = tokenize_prompt(frozen, contract, text, pictures)
        if ours.input_ids != theirs:
            raise ExportError(
                f"tokenize: prompt {text[:40]!r} with {count} pictures gives {ours.input_ids[:24]}, transformers' "
                f"processor gives {theirs[:24]}; the frozen prompt contract does not describe this checkpoint"
            )
        places = [i for i, token in enumerate(theirs) if token == contract.image_token_id]
        if places != ours.image_positions:
            raise ExportError(
                f"tokenize: the placeholders of prompt {text[:40]!r} stand at {places[:8]}, the frozen contract "
                f"puts them at {ours.image_positions[:8]}"
            )


def _check_instructions(processor: Any, frozen: InstructionTokenizer) -> None:
    """Ids of the connector's own tokenizer, also of a text that is longer than what the model reads."""
    for text in (*PROMPTS, "a " * 4096):
        with quiet_transformers():  # they tell of texts that are too long
            theirs = [int(i) for i in processor(text=text)["qformer_input_ids"][0]]
        ours = frozen.encode(text)
        if ours != theirs:
            raise ExportError(
                f"tokenize: instruction {text[:40]!r} gives {ours[:24]}, transformers' processor gives {theirs[:24]}; "
                "the frozen tokenizer of the Q-Former does not describe this checkpoint"
            )


def _frame_by_frame(image: ImageContract) -> ImageContract:
    """`image` for single pictures: each frame of a video goes through the same steps."""
    if not isinstance(image.tiling, Frames):
        return image
    return image.model_copy(update={"tiling": Whole(tokens=image.tiling.tokens)})


def _blank(image: ImageContract) -> Any:
    """A picture, or a video of as many frames as the model takes."""
    blank = Image.new("RGB", (8, 8))
    if not isinstance(image.tiling, Frames):
        return blank
    return [blank] * (image.tiling.frames or image.tiling.sample or 1)


def _their_ids(processor: Any, contract: PromptContract, text: str, images: list[Any]) -> list[int]:
    if any(segment.kind == "image" for segment in contract.segments):
        ids = processor(images=images[0], text=text)["input_ids"]
    else:
        special = contract.segments[-1].kind == "text" and contract.segments[-1].add_special_tokens
        turn = render_turn(processor, text, len(images))
        ids = processor(images=[images] if images else None, text=[turn], add_special_tokens=special)["input_ids"]
    return [int(i) for i in ids[0]]


def check_decode(original: Any, frozen: Any, contract: PromptContract) -> None:
    """Raise ExportError where the two tokenizers make different texts of the same ids."""
    for ids in _id_runs(original, contract.image_token_id):
        theirs = original.decode(ids, skip_special_tokens=True)
        ours = decode(frozen, ids)
        if ours != theirs:
            raise ExportError(f"decode: ids {ids[:16]} give {ours!r}, transformers gives {theirs!r}")


def _id_runs(original: Any, image_token_id: int) -> Iterator[list[int]]:
    """Ids of the prompts, and random ones, with special tokens and the placeholder among them."""
    for text in PROMPTS:
        yield original(text)["input_ids"]
    random = np.random.default_rng(1)
    for _ in range(8):
        ids = [int(i) for i in random.integers(0, len(original), 24)]
        yield [*ids, image_token_id, *ids[:3]]
