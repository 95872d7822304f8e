"""The checkpoint's own tokenizer and processors, loaded by transformers, never from a network."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..models.remote_code import loader_options, refuse_remote_code
from .processor_of_frames import load_for_frames, takes_frames
from .processor_without_video import load_without_video, takes_videos

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
IMAGE_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer alone, as its files have it (`Blip2Processor` would add a lacking image token)."""
    from transformers import AutoTokenizer

    make: Any = AutoTokenizer
    _need_one_of(path, TOKENIZER_FILES, "tokenizer")
    tokenizer = _load(path, "tokenizer", lambda: make.from_pretrained(path, **loader_options()))
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{path}: the tokenizer has no tokenizer.json form; save it with a fast tokenizer of transformers"
        )
    return tokenizer


def load_image_processor(path: Path) -> Any:
    """The image processor, run by Pillow and numpy."""
    from transformers import AutoImageProcessor

    make: Any = AutoImageProcessor
    _need_one_of(path, IMAGE_PROCESSOR_FILES, "image processor")
    return _load(path, "image processor", lambda: make.from_pretrained(path, backend="pil", **loader_options()))


def load_processor(path: Path) -> Any:
    """The whole processor, run by Pillow and numpy; for pictures alone where it would take videos too."""
    from transformers import AutoProcessor

    make: Any = AutoProcessor
    _need_one_of(path, TOKENIZER_FILES, "tokenizer")
    _need_one_of(path, IMAGE_PROCESSOR_FILES, "image processor")
    if takes_frames(path):
        return _load(path, "processor", lambda: load_for_frames(path, load_tokenizer(path)))
    if takes_videos(path):
        parts = load_image_processor(path), load_tokenizer(path)
        return _load(path, "processor", lambda: load_without_video(path, *parts))
    return _load(path, "processor", lambda: make.from_pretrained(path, backend="pil", **loader_options()))


def image_token_text(path: Path, tokenizer: Any, image_token_id: int) -> str:
    """The text of the image token. Raises CheckpointError when no added token has that id."""
    token = tokenizer.added_tokens_decoder.get(image_token_id)
    if token is None:
        raise CheckpointError(
            f"{path}: the tokenizer has no image token: config.json says image_token_index {image_token_id}, "
            "and no added token has that id; add '<image>' to the tokenizer and save it again"
        )
    text: str = token.content
    return text


def _need_one_of(path: Path, names: tuple[str, ...], what: str) -> None:
    if not any((path / name).is_file() for name in names):
        raise CheckpointError(f"{path} has no {what} (none of {', '.join(names)}); copy the whole checkpoint")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Its loaders log advice on torchvision and on fast tokenizers; its errors still raise."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _refuse_code(path: Path) -> None:
    """UnsupportedError where a file of the tokenizer or processor asks for code from the checkpoint's directory.

    Only after they failed to load: where transformers has the class itself, it loads, and that request is void.
    """
    for file in (path / name for name in (*IMAGE_PROCESSOR_FILES, "tokenizer_config.json")):
        try:
            raw = json.loads(file.read_bytes())
        except (OSError, ValueError):
            continue  # the caller says why the file does not load
        if isinstance(raw, dict):
            refuse_remote_code(str(file), raw)


def _load(path: Path, what: str, load: Callable[[], Any]) -> Any:
    try:
        with quiet_transformers():
            return load()
    except Exception as error:
        _refuse_code(path)
        # transformers, tokenizers and json raise what they like for a file that they cannot take.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: the {what} does not load ({reason[:200]}); copy its files again") from error
