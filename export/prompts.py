"""Freeze how a checkpoint lays out pictures and a prompt: BLIP-2's way, or its processor's chat template.

A chat template is a program; what it does to one user turn is data, found by rendering it with a mark for the prompt
and with 0 to 3 pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from ..manifest import ImageSegment, PromptContract, TextSegment
from .checkpoint_processor import image_token_text, load_processor, load_tokenizer
from .processor_of_frames import takes_frames
from .tokenizer import placeholder_text

# Nothing that a template would split, trim or change.
MARK = "Xq7promptq7X"
# What stands where a checkpoint has no chat template: pictures, a line each, then the prompt.
PLAIN_TEMPLATE = "{images}{prompt}"
PLAIN_IMAGE = "{image}\n"
MAX_IMAGES = 64


def freeze_blip2_prompt(checkpoint: str | Path, config: Any) -> PromptContract:
    """Placeholders first, then the tokenised prompt with its BOS: what `Blip2Processor` does.

    Raises CheckpointError when the tokenizer has no image token or processor and config disagree.
    """
    path = Path(checkpoint)
    tokenizer = load_tokenizer(path)
    token_id = config.video_token_index if takes_frames(path) else config.image_token_index
    image_token = image_token_text(path, tokenizer, token_id)
    processor = load_processor(path)
    _check_image_token(path, processor, token_id, image_token)
    if processor.num_query_tokens != config.num_query_tokens:
        raise CheckpointError(
            f"{path}: the processor has num_query_tokens {processor.num_query_tokens}, config.json has "
            f"{config.num_query_tokens}; set it in processor_config.json"
        )
    return PromptContract(
        segments=(ImageSegment(), TextSegment(add_special_tokens=True)),
        image_token_id=token_id,
        image_token=image_token,
        placeholder=placeholder_text(tokenizer),
    )


def freeze_chat_prompt(checkpoint: str | Path, config: Any) -> PromptContract:
    """One user turn with its pictures in front, as the checkpoint's chat template has it.

    Without a template: every picture on a line of its own, then the prompt. Raises CheckpointError when the tokenizer
    has no image token or processor and config disagree, UnsupportedError for a template that does more than to put
    texts around pictures and prompt.
    """
    path = Path(checkpoint)
    tokenizer = load_tokenizer(path)
    image_token = image_token_text(path, tokenizer, config.image_token_id)
    processor = load_processor(path)
    _check_image_token(path, processor, config.image_token_id, image_token)
    shared: dict[str, Any] = {
        "image_token_id": config.image_token_id,
        "image_token": image_token,
        "placeholder": placeholder_text(tokenizer),
        "images_per_prompt": MAX_IMAGES,
    }
    if not getattr(processor, "chat_template", None):
        return PromptContract(
            segments=(TextSegment(template=PLAIN_TEMPLATE, add_special_tokens=True),),
            text_only=(TextSegment(add_special_tokens=True),),
            image=PLAIN_IMAGE,
            **shared,
        )
    without, template, image = _take_apart(path, processor, image_token)
    special = _adds_special_tokens(processor, template)
    return PromptContract(
        segments=(TextSegment(template=template, add_special_tokens=special),),
        text_only=(TextSegment(template=without, add_special_tokens=special),),
        image=image,
        **shared,
    )


def render_turn(processor: Any, prompt: str, images: int) -> str:
    """The text of one user turn with `images` pictures, ready for the answer, as transformers renders it."""
    return render_content(processor, prompt, ["image"] * images)


def render_content(processor: Any, prompt: str, kinds: Sequence[str]) -> str:
    """As `render_turn`, with pictures ("image") and videos ("video") in that order in front of the prompt."""
    if not getattr(processor, "chat_template", None):
        tokens = (processor.image_token if kind == "image" else processor.video_token for kind in kinds)
        return "".join(PLAIN_IMAGE.replace("{image}", token) for token in tokens) + prompt
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": prompt}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text


def _take_apart(path: Path, processor: Any, image_token: str) -> tuple[str, str, str]:
    """Template without pictures, template with `{images}`, and the text of one picture with `{image}`."""
    try:
        without, one, *more = (render_turn(processor, MARK, count) for count in range(4))
    except Exception as error:
        # Jinja's errors, and whatever a template raises by itself.
        reason = " ".join(str(error).split())[:160]
        raise UnsupportedError(
            f"{path}: the chat template does not render a user turn with pictures and a text ({reason}); accepted is "
            'one that takes {"type": "image"} and {"type": "text"}'
        ) from error
    start = _common(without, one)
    end = _common(without[start:][::-1], one[start:][::-1])
    block = one[start : len(one) - end]
    regular = all(
        text == one[:start] + block * count + one[len(one) - end :] for count, text in enumerate(more, start=2)
    )
    if block.count(image_token) != 1 or without.count(MARK) != 1 or not regular:
        raise UnsupportedError(
            f"{path}: the chat template puts more than a fixed text around a picture (it renders {one!r} for one "
            f"picture and {more[0]!r} for two); accepted is one whose pictures stand one after the other"
        )
    template = one[:start] + "{images}" + one[len(one) - end :]
    return (
        without.replace(MARK, "{prompt}"),
        template.replace(MARK, "{prompt}"),
        block.replace(image_token, "{image}"),
    )


def _common(left: str, right: str) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _adds_special_tokens(processor: Any, template: str) -> bool:
    """As `apply_chat_template(tokenize=True)` decides: not where the template begins with BOS itself."""
    bos = processor.tokenizer.bos_token
    return bos is None or not template.startswith(bos)


def _check_image_token(path: Path, processor: Any, token_id: int, image_token: str) -> None:
    token = processor.video_token if takes_frames(path) else processor.image_token
    named = getattr(token, "content", token)
    if named != image_token:
        raise CheckpointError(
            f"{path}: the processor's image token is {named!r}, but token {token_id} (the image token of config.json) "
            f"is {image_token!r}; make them one"
        )
