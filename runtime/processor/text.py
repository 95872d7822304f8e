"""Prompt to token ids and the placeholders' positions; token ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from ...errors import BundleError, InputError
from ...manifest import ImageSegment, PromptContract


class EncodedPrompt(NamedTuple):
    """`input_ids`: the whole prompt. `image_positions`: where in it the image embeddings go."""

    input_ids: list[int]
    image_positions: slice


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The bundle's `tokenizer.json`. Raises BundleError when it does not load."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises a bare Exception for every fault.
        raise BundleError(f"{path} is not a tokenizer ({' '.join(str(error).split())}); export again") from error


def tokenize_prompt(
    tokenizer: Tokenizer, contract: PromptContract, prompt: str, *, context_length: int | None = None
) -> EncodedPrompt:
    """Lay `prompt` out as the contract's segments say.

    Placeholders come from the segments alone: text that reads like the placeholder stays text.

    Raises InputError when the prompt is no string or no valid Unicode, or when the whole is longer than
    `context_length` tokens; BundleError when the contract does not have exactly one place for an image.
    """
    if not isinstance(prompt, str):
        raise InputError(f"a prompt must be a string, got {type(prompt).__name__}")
    ids: list[int] = []
    places: list[slice] = []
    for segment in contract.segments:
        if isinstance(segment, ImageSegment):
            places.append(slice(len(ids), len(ids) + contract.tokens_per_image))
            ids += [contract.image_token_id] * contract.tokens_per_image
        else:
            # Not str.format: braces in a prompt are text.
            text = segment.template.replace("{prompt}", prompt)
            ids += _encode(tokenizer, text, segment.add_special_tokens, contract)
    if len(places) != 1:
        raise BundleError(f"the prompt contract has {len(places)} image segments; this version runs one")
    if context_length is not None and len(ids) > context_length:
        raise InputError(
            f"the prompt takes {len(ids)} tokens (with {contract.tokens_per_image} for the picture), and the "
            f"model's context is {context_length}; shorten the prompt"
        )
    return EncodedPrompt(ids, places[0])


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool, contract: PromptContract) -> list[int]:
    try:
        ids = list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
    except (UnicodeEncodeError, TypeError) as error:
        raise InputError(f"the prompt is not valid Unicode ({error}); remove lone surrogates") from error
    if contract.image_token_id in ids:
        # The export gave the placeholder a text that nobody types by chance; here somebody copied it.
        raise InputError(
            f"the prompt holds the text of token {contract.image_token_id}, which this bundle keeps for "
            "pictures; remove it from the prompt"
        )
    return ids


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Text of generated token ids, special tokens left out."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return text
