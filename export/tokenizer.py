"""Freeze a checkpoint's tokenizer: the same ids for the same text, and no text that becomes the image token."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from .checkpoint_processor import image_token_text, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def placeholder_text(tokenizer: Any, kind: str = "image") -> str:
    """The image token's spelling in the bundle: one that nobody types by chance, the same for the same tokenizer.

    `kind`: "video" for the video token's.
    """
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return f"<|{kind} placeholder {digest}|>"


def freeze_tokenizer(
    checkpoint: str | Path, directory: str | Path, image_token_id: int, video_token_id: int | None = None
) -> Path:
    """Write `tokenizer.json` into `directory` with the image token spelled `placeholder_text`; returns its path.

    Every token keeps its id, and the image token's old spelling becomes ordinary text. `video_token_id`: a second
    token, treated alike.

    Raises CheckpointError when the checkpoint has no tokenizer or that no image token, ExportError when the
    old spelling still becomes the image token.
    """
    from tokenizers import Tokenizer

    path = Path(checkpoint)
    tokenizer = load_tokenizer(path)
    respelled = {image_token_id: placeholder_text(tokenizer)}
    if video_token_id is not None:
        respelled[video_token_id] = placeholder_text(tokenizer, "video")
    old = {token_id: image_token_text(path, tokenizer, token_id) for token_id in respelled}
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["truncation"] = document["padding"] = None
    for token_id, placeholder in respelled.items():
        _respell(document, token_id, placeholder)
    frozen = Tokenizer.from_str(json.dumps(document))
    _check_ids(frozen, tokenizer.backend_tokenizer, old)
    for token_id, placeholder in respelled.items():
        _check_placeholder(frozen, placeholder, token_id)
    target = Path(directory) / "tokenizer.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return target


def _respell(document: dict[str, Any], image_token_id: int, text: str) -> None:
    """Give the image token of a `tokenizer.json` document another spelling, in place."""
    entry = next(entry for entry in document["added_tokens"] if entry["id"] == image_token_id)
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, dict) and entry["content"] in vocabulary:
        # A trainer puts its special tokens among the model's too; the id comes from there.
        vocabulary[text] = vocabulary.pop(entry["content"])
    elif isinstance(vocabulary, list):
        # A Unigram model: pieces with their scores, the id is the place.
        for piece in vocabulary:
            if piece[0] == entry["content"]:
                piece[0] = text
    entry["content"] = text


def _check_placeholder(frozen: Tokenizer, placeholder: str, image_token_id: int) -> None:
    ids = frozen.encode(placeholder * 3, add_special_tokens=False).ids
    if ids != [image_token_id] * 3:
        raise ExportError(
            f"tokenizer: three image tokens in a row become {ids[:8]} instead of {image_token_id} three times; its "
            "added token for pictures is matched in another way than as itself"
        )


def _check_ids(frozen: Tokenizer, original: Tokenizer, respelled: dict[int, str]) -> None:
    """No other id has moved, and no text with an old spelling of `respelled` in it becomes such a token."""
    before = {i: token for token, i in original.get_vocab(with_added_tokens=True).items()}
    after = {i: token for token, i in frozen.get_vocab(with_added_tokens=True).items()}
    for token_id, token in before.items():
        if token_id not in respelled and after.get(token_id) != token:
            names = " and ".join(map(repr, respelled.values()))
            raise ExportError(
                f"tokenizer: freezing it moved token {token_id} from {token!r} to {after.get(token_id)!r}; "
                f"give the image token {names} the last id"
            )
    for image_token_id, image_token in respelled.items():
        for text in (image_token, f"a{image_token}b", f" {image_token} ", image_token * 3):
            if image_token_id in frozen.encode(text).ids:
                raise ExportError(
                    f"tokenizer: the text {text!r} still becomes the image token {image_token_id}; "
                    "the tokenizer's model holds it as an ordinary piece"
                )
