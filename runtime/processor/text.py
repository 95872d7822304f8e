"""Prompt to token ids and the placeholders' positions; token ids to text."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from ...errors import BundleError, InputError
from ...manifest import ImageSegment, PromptContract

Pieces = Sequence[str | int]
# Marks of a template, and of a prompt that says itself where its pictures stand.
_MARKS = re.compile(r"\{(images|prompt)\}")
IMAGE_MARK = "{image}"
VIDEO_MARK = "{video}"
NUMBER_MARK = "{number}"


class EncodedPrompt(NamedTuple):
    """`input_ids`: the whole prompt. `image_positions`: where in it the features of its pictures go, in order."""

    input_ids: list[int]
    image_positions: list[int]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The bundle's `tokenizer.json`. Raises BundleError when it does not load."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises a bare Exception for every fault.
        raise BundleError(f"{path} is not a tokenizer ({' '.join(str(error).split())}); export again") from error


def tokenize_prompt(
    tokenizer: Tokenizer,
    contract: PromptContract,
    prompt: str,
    pictures: Sequence[Pieces] = (),
    *,
    videos: Collection[int] = (),
    interleave: bool = False,
    context_length: int | None = None,
) -> EncodedPrompt:
    """Lay `prompt` and its pictures out as the contract's segments say.

    `pictures`: what stands for each, texts and counts of image tokens (`PictureTensors.pieces`). `videos`: which of
    them, counted from 0, are videos, whose tokens are video tokens. `interleave`: each `{image}` in `prompt` is where
    the next picture or video stands; else they stand where the contract has them, and the mark is ordinary text.

    Raises InputError when the prompt is no string or no valid Unicode, when it has another number of marks than there
    are pictures, when there are more pictures than the contract allows, or when the whole is longer than
    `context_length` tokens; BundleError when the contract has no place for a picture.
    """
    if not isinstance(prompt, str):
        raise InputError(f"a prompt must be a string, got {type(prompt).__name__}")
    spellings = _placeholders(contract)
    for spelling, token in spellings.items():
        if spelling in prompt:
            raise InputError(
                f"the prompt holds the text that this bundle keeps for pictures (token {token}); "
                "remove it from the prompt"
            )
    _check_pictures(contract, prompt, len(pictures), interleave)
    prompt = _strip(prompt, contract.strip, interleave)
    images = [_wrap(contract, pieces, place, video=place in videos) for place, pieces in enumerate(pictures)]
    segments = contract.segments if pictures else contract.text_only or contract.segments
    wanted = sum(_count(pieces) for pieces in pictures)
    ids: list[int] = []
    positions: list[int] = []
    for segment in segments:
        start = len(ids)
        if isinstance(segment, ImageSegment):
            ids += [contract.image_token_id] * wanted
            positions += range(start, len(ids))
            continue
        text = _fill(segment.template, prompt, images, contract.between, interleave)
        if contract.boundary is not None:
            text = join_boundaries(text, contract.boundary, contract.boundary_gap)
        ids += encode_text(tokenizer, text, segment.add_special_tokens)
        tokens = {token for spelling, token in spellings.items() if spelling in text}
        positions += [place for place in range(start, len(ids)) if ids[place] in tokens]
    if len(positions) != wanted:
        raise BundleError(
            f"the prompt has {len(positions)} image tokens where its pictures give {wanted} features; the prompt "
            "contract does not fit the tokenizer, export the bundle again"
        )
    if context_length is not None and len(ids) > context_length:
        raise InputError(
            f"the prompt takes {len(ids)} tokens (with {wanted} for pictures), and the model's context is "
            f"{context_length}; shorten the prompt"
        )
    return EncodedPrompt(ids, positions)


def _check_pictures(contract: PromptContract, prompt: str, count: int, interleave: bool) -> None:
    if count > contract.images_per_prompt:
        raise InputError(f"{count} pictures came for one prompt; this model takes at most {contract.images_per_prompt}")
    if not count and contract.text_only is None:
        raise InputError("no picture came, and this model takes no prompt without one; give a picture")
    if not interleave:
        return
    if any(isinstance(segment, ImageSegment) for segment in contract.segments):
        raise InputError("this model takes its picture before the prompt; leave interleave (--interleave) out")
    if (marks := prompt.count(IMAGE_MARK)) != count:
        raise InputError(
            f"the prompt has {marks} {IMAGE_MARK} marks and {count} pictures came; give one mark for each picture"
        )


def _strip(prompt: str, characters: str, interleave: bool) -> str:
    """`characters` off both ends of every text that stands between pictures."""
    if not characters:
        return prompt
    texts = prompt.split(IMAGE_MARK) if interleave else [prompt]
    return IMAGE_MARK.join(text.strip(characters) for text in texts)


def _placeholders(contract: PromptContract) -> dict[str, int]:
    """The spellings of the tokens that stand for pictures and videos, and their ids."""
    video = contract.video
    return {contract.placeholder: contract.image_token_id} | ({video.placeholder: video.token_id} if video else {})


def _wrap(contract: PromptContract, pieces: Pieces, place: int, *, video: bool) -> str:
    """What stands for one picture or video in the text; `place` is how many came before it.

    Raises BundleError where the contract has no video token.
    """
    if not video:
        return contract.image.replace(NUMBER_MARK, str(place + 1)).replace(
            IMAGE_MARK, _spell(pieces, contract.placeholder)
        )
    if contract.video is None:
        raise BundleError("a video came, and the prompt contract has no token for one; export the bundle again")
    return contract.video.text.replace(VIDEO_MARK, _spell(pieces, contract.video.placeholder))


def _spell(pieces: Pieces, placeholder: str) -> str:
    return "".join(piece if isinstance(piece, str) else placeholder * piece for piece in pieces)


def _count(pieces: Pieces) -> int:
    return sum(piece for piece in pieces if isinstance(piece, int))


def _fill(template: str, prompt: str, images: Sequence[str], between: str, interleave: bool) -> str:
    """In one pass and not by str.format: what the prompt holds, braces too, is text."""
    if interleave:
        parts = prompt.split(IMAGE_MARK)
        prompt = parts[0] + "".join(image + part for image, part in zip(images, parts[1:], strict=True))
        images = ()
    values = {"images": between.join(images), "prompt": prompt}
    return _MARKS.sub(lambda mark: values[mark[1]], template)


def join_boundaries(text: str, boundary: str, gap: str = " ") -> str:
    """The prompt's text with the pictures' pieces in it, boundaries joined as `Idefics2Processor` does.

    Two boundaries in a row become one; one that a letter follows gets a `gap`. The text that stands for an image token
    must begin with `<`, as `<image>` does, else it too would get that space.
    """
    return re.sub(rf"{re.escape(boundary)}(?=[^\s<])", f"{boundary}{gap}", text.replace(boundary * 2, boundary))


def encode_text(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids. Raises InputError for what is no valid Unicode."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
    except (UnicodeEncodeError, TypeError) as error:
        raise InputError(f"the prompt is not valid Unicode ({error}); remove lone surrogates") from error


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Text of generated token ids, special tokens left out."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return text
