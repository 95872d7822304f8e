"""Freeze what a scoring checkpoint's processor does to texts, and hold it against that processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import CheckpointError, ExportError, InputError, UnsupportedError
from ..runtime.processor import load_tokenizer
from ..runtime.score_text import tokenize_texts
from ..score_contract import TextContract
from .processor_check import PROMPTS
from .siglip_tokenizer import convert_siglip_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Special tokens stand around this word; it must be one that tokenizers keep.
_WORD = "a photo"
_TEXTS = ("two", "A photo of THREE red circles, left!", *PROMPTS)


def freeze_text(
    path: Path, processor: Any, *, positions: int, vocab_size: int, padding: Literal["longest", "max_length"]
) -> TextContract:
    """How the tokenizer of `processor` lays out texts for a model with that many positions and embeddings.

    `padding` is what the model was trained with; transformers' processors leave it to the caller.
    Raises CheckpointError for special tokens that the model has no embedding for or a lacking pad token,
    UnsupportedError for special tokens inside a text.
    """
    tokenizer = processor.tokenizer
    leading, trailing = _special_tokens(path, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None:
        raise CheckpointError(f"{path}: the tokenizer has no pad token, so texts of two lengths make no batch; set one")
    for token in (*leading, *trailing, pad):
        if token >= vocab_size:
            raise CheckpointError(
                f"{path}: the tokenizer puts token {token} into every text, the model has embeddings for {vocab_size} "
                "only; the tokenizer is of another model"
            )
    return TextContract(
        # Many tokenizers know no limit, which transformers writes as 1e30.
        max_length=min(tokenizer.model_max_length, positions),
        leading_ids=leading,
        trailing_ids=trailing,
        truncation_side=tokenizer.truncation_side,
        padding=padding,
        padding_side=tokenizer.padding_side,
        pad_token_id=pad,
        attention_mask="attention_mask" in tokenizer.model_input_names,
        vocab_size=vocab_size,
    )


def _special_tokens(path: Path, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before and behind a text."""
    whole, bare = (tokenizer(_WORD, add_special_tokens=special)["input_ids"] for special in (True, False))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    raise UnsupportedError(f"{path}: the tokenizer changes a text that its special tokens stand around")


def freeze_score_tokenizer(path: Path, processor: Any, vocab_size: int, directory: Path) -> Path:
    """Write `tokenizer.json` into `directory`; returns its path.

    Added tokens without an embedding (a processor's own image token) become ordinary text.
    """
    document = json.loads(_fast(path, processor.tokenizer).to_str())
    document["truncation"] = document["padding"] = None
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < vocab_size]
    target = directory / "tokenizer.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return target


def _fast(path: Path, tokenizer: Any) -> Tokenizer:
    if tokenizer.is_fast:
        fast: Tokenizer = tokenizer.backend_tokenizer
        return fast
    if type(tokenizer).__name__ != "SiglipTokenizer":
        raise UnsupportedError(
            f"{path}: the tokenizer {type(tokenizer).__name__} has no tokenizer.json form; save it with a fast one"
        )
    return convert_siglip_tokenizer(path, tokenizer)


def check_frozen_text(
    processor: Any, contract: TextContract, file: Path, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Several texts, alone and in one padded batch, through both; returns what was compared, for the manifest.

    `options`: what transformers' tokenizer is called with, by default what the contract says. Raises ExportError
    naming the first text whose ids or mask depart from those of transformers' own.
    """
    frozen = load_tokenizer(file)
    texts = [text for text in _TEXTS if _comparable(processor.tokenizer, frozen, contract, text)]
    for batch in (*([text] for text in texts), texts):
        ours = tokenize_texts(frozen, contract, batch)
        theirs = processor.tokenizer(batch, return_tensors="np", **(options or tokenizer_options(contract)))
        _compare(batch, "input_ids", ours.input_ids, theirs["input_ids"])
        if contract.attention_mask:
            _compare(batch, "attention_mask", ours.attention_mask, theirs["attention_mask"])
    return {"texts": len(texts), "max_length": contract.max_length}


def tokenizer_options(contract: TextContract) -> dict[str, Any]:
    """What a caller of transformers' tokenizer passes to have texts laid out as the contract says."""
    return {"padding": contract.padding, "truncation": True, "max_length": contract.max_length}


def _comparable(original: Any, frozen: Any, contract: TextContract, text: str) -> bool:
    """Not what is refused at run time, nor special tokens in a SigLIP text (see `siglip_tokenizer`)."""
    if not original.is_fast and any(token in text for token in original.all_special_tokens):
        return False
    try:
        tokenize_texts(frozen, contract, [text])
    except InputError:
        return False
    return True


def _compare(texts: list[str], name: str, ours: Any, theirs: Any) -> None:
    if ours.tolist() != theirs.tolist():
        row = next((i for i, (a, b) in enumerate(zip(ours.tolist(), theirs.tolist(), strict=True)) if a != b), 0)
        raise ExportError(
            f"tokenize: {name} of text {texts[row][:40]!r} are {ours[row].tolist()[:24]}, transformers gives "
            f"{theirs[row].tolist()[:24]}; the frozen text contract does not describe this checkpoint"
        )
