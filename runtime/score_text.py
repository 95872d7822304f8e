"""Texts to the tensors that a score bundle's text stages take, as its contract lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..score_contract import TextContract

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SHOWN = 40


@dataclass(frozen=True)
class TextTensors:
    """`input_ids`, `attention_mask` `[T, L]` int64; `lengths`: each text's tokens before anything was cut off."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    lengths: tuple[int, ...]


def tokenize_texts(tokenizer: Tokenizer, contract: TextContract, texts: Sequence[str]) -> TextTensors:
    """Lay out `texts`, which may be longer than the contract's `max_length`: `lengths` says which were cut.

    Raises InputError when there is no text, for what is no string or no valid Unicode, and for a text without a token
    (nothing, white space, what the tokenizer drops) or with one that the model has no embedding for.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise InputError(f"texts came as a {type(texts).__name__}; accepted is a list of strings")
    if not texts:
        raise InputError("no text came; give at least one")
    rows = [_encode(tokenizer, contract, number, text) for number, text in enumerate(texts, start=1)]
    special = len(contract.leading_ids) + len(contract.trailing_ids)
    room = contract.max_length - special
    cut = [row[:room] if contract.truncation_side == "right" else row[-room:] for row in rows]
    whole = [[*contract.leading_ids, *row, *contract.trailing_ids] for row in cut]
    width = contract.max_length if contract.padding == "max_length" else max(len(row) for row in whole)
    input_ids = np.full((len(whole), width), contract.pad_token_id, np.int64)
    mask = np.zeros_like(input_ids) if contract.attention_mask else np.ones_like(input_ids)
    for i, row in enumerate(whole):
        place = slice(0, len(row)) if contract.padding_side == "right" else slice(width - len(row), width)
        input_ids[i, place], mask[i, place] = row, 1
    return TextTensors(input_ids, mask, tuple(len(row) + special for row in rows))


def _encode(tokenizer: Tokenizer, contract: TextContract, number: int, text: str) -> list[int]:
    """The text's own tokens; `number` counts from 1, for errors."""
    if not isinstance(text, str):
        raise InputError(f"text {number} is a {type(text).__name__}; accepted is a string")
    if not text.strip():
        raise InputError(f"text {number} is empty; give words to compare the picture with")
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except (UnicodeEncodeError, TypeError) as error:
        raise InputError(f"text {number} is not valid Unicode ({error}); remove lone surrogates") from error
    if not ids:
        raise InputError(f"text {number} ({text[:_SHOWN]!r}) has no token that the model reads; give words")
    for token in ids:
        if token >= contract.vocab_size:
            raise InputError(
                f"text {number} holds {tokenizer.id_to_token(token)!r}, token {token}, but the model has embeddings "
                f"for {contract.vocab_size} only; remove it from the text"
            )
    return ids
