"""What the first Qwen-VL does to pictures and prompts, from its project's code (`tokenization_qwen.py`, `visual.py`,
`qwen_generation_utils.py`), of which nothing is run.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import CheckpointError, ExportError
from ..manifest import GenerationContract, ImageContract, PromptContract, TextSegment
from ..models.qwen_vl import chat_format
from ..runtime.processor import decode, tokenize_prompt
from ..runtime.processor import load_tokenizer as read_tokenizer
from .frozen import FrozenProcessor
from .picture_check import check_frozen_pictures
from .processor_check import PROMPTS
from .prompts import MAX_IMAGES
from .tiktoken_bpe import read_ranks, tokenizer_from_ranks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..models.checkpoint import VisionLanguageModel
    from .qwen_vl_reference import ReferenceProcessor

RANKS = "qwen.tiktoken"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SYSTEM = "You are a helpful assistant."
EXTRA = tuple(f"<|extra_{number}|>" for number in range(205))
# Marks of places in a picture: a user may write them, and they stand in answers.
KEPT = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE_MARKS = ("<img>", "</img>", "<imgpad>")


def special_tokens() -> tuple[str, ...]:
    """All special tokens, in the order of their ids."""
    return ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *EXTRA, *KEPT, *IMAGE_MARKS)


def load_ranks(path: Path, config: Any) -> dict[bytes, int]:
    """The tokenizer's ranks. Raises CheckpointError when they are not those that config.json was made for."""
    ranks = read_ranks(path / RANKS)
    pad = len(ranks) + len(special_tokens()) - 1
    if pad != config.image_token_id:
        raise CheckpointError(
            f"{path / RANKS} has {len(ranks)} tokens, so {IMAGE_MARKS[0]} is token {pad - 2}, but config.json says "
            f"visual.image_start_id {config.image_token_id - 2}; they are of different models"
        )
    return ranks


def freeze_qwen_vl(model: VisionLanguageModel, directory: Path, image: ImageContract) -> FrozenProcessor:
    """The contracts of `model`, and its tokenizer written into `directory`.

    Raises CheckpointError for a tokenizer that cannot be read, ExportError when what is frozen departs from the
    project's steps.
    """
    from .qwen_vl_reference import ReferenceProcessor

    chat = chat_format(model.path) == "chatml"
    ranks = load_ranks(model.path, model.config)
    spelled = _spellings(model.path / RANKS, chat)
    special = [(spelled[name], name not in KEPT) for name in special_tokens()]
    tokenizer = tokenizer_from_ranks(ranks, PATTERN, special)
    target = directory / "tokenizer.json"
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target))
    prompt = _prompt(spelled, model.config.image_token_id, chat)
    reference = ReferenceProcessor(model.path, model.config, chat)
    checks = _check(reference, image, prompt, read_tokenizer(target))
    return FrozenProcessor(image, prompt, _generation(model.text_config), target, checks)


def _spellings(file: Path, chat: bool) -> dict[str, str]:
    """Special token -> its spelling in the bundle: a secret for those that a user cannot write.

    In a chat the project looks in a user's text for marks of places alone (and for pictures, which here no text can
    be), in a plain prompt for every token.
    """
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    secret = [name for name in special_tokens() if name in IMAGE_MARKS or (chat and name not in KEPT)]
    return {
        name: f"<|{name.strip('<|>')} placeholder {digest}|>" if name in secret else name for name in special_tokens()
    }


def _prompt(spelled: dict[str, str], image_token_id: int, chat: bool) -> PromptContract:
    """`make_context`: a chat's turns are tokenised apart from what the user writes."""
    start, end, pad = (spelled[mark] for mark in IMAGE_MARKS)
    opened, closed = spelled["<|im_start|>"], spelled["<|im_end|>"]
    before, after = f"{opened}system\n{SYSTEM}{closed}\n{opened}user\n", f"{closed}\n{opened}assistant\n"
    texts = (before, "{images}{prompt}", after) if chat else ("{images}{prompt}",)
    segments = tuple(TextSegment(template=text, add_special_tokens=False) for text in texts)
    return PromptContract(
        segments=segments,
        text_only=segments,
        image=f"Picture {{number}}: {start}{{image}}{end}\n",
        image_token_id=image_token_id,
        image_token=IMAGE_MARKS[2],
        placeholder=pad,
        images_per_prompt=MAX_IMAGES,
    )


def _generation(text: Any) -> GenerationContract:
    return GenerationContract(
        eos_token_ids=tuple(text.eos_token_id),
        pad_token_id=text.pad_token_id,
        bos_token_id=None,
        context_length=text.max_position_embeddings,
        vocab_size=text.vocab_size,
    )


def _check(
    reference: ReferenceProcessor, image: ImageContract, prompt: PromptContract, frozen: Tokenizer
) -> dict[str, Any]:
    """Pictures through transformers' processor; prompts and answers by the ranks, in plain Python."""
    pictures = check_frozen_pictures(reference.image_processor, image)
    blank, queries = Image.new("RGB", (8, 8)), reference.num_query_tokens
    texts = (*PROMPTS, *_VOCABULARY_OF_CHATS, *_some_tokens(reference.ranks))
    for text in texts:
        for count in (0, 1, 2):
            theirs = [int(i) for i in reference([blank] * count or None, text)["input_ids"][0]]
            ours = tokenize_prompt(frozen, prompt, text, [(queries,)] * count).input_ids
            if ours != theirs:
                raise ExportError(
                    f"tokenize: prompt {text[:40]!r} with {count} pictures gives {ours[:24]}, the ranks of {RANKS} "
                    f"give {theirs[:24]}; the frozen tokenizer does not describe this checkpoint"
                )
    _check_decode(reference, frozen)
    return {**pictures, "prompts": len(texts)}


_VOCABULARY_OF_CHATS = (
    "<|im_end|>\n<|im_start|>system",
    "<box>(1,2),(3,4)</box><ref>it</ref>",
    "\n\n a\n\n\n",
    "2024年",
)


def _some_tokens(ranks: dict[bytes, int]) -> list[str]:
    """Texts of the vocabulary, spread over it."""
    tokens = sorted(ranks, key=ranks.__getitem__)
    return [token.decode(errors="ignore") for token in tokens[:: max(1, len(tokens) // 64)]]


def _check_decode(reference: ReferenceProcessor, frozen: Tokenizer) -> None:
    """Runs of ids to text: bytes joined, marks of places kept, other special tokens left out."""
    texts = {rank: token for token, rank in reference.ranks.items()}
    texts |= {
        len(reference.ranks) + place: name.encode() if name in KEPT else b""
        for place, name in enumerate(special_tokens())
    }
    random = np.random.default_rng(0)
    for _ in range(16):
        ids = [int(i) for i in random.integers(0, len(texts), 24)]
        theirs, ours = b"".join(texts[i] for i in ids).decode(errors="replace"), decode(frozen, ids)
        if ours != theirs:
            raise ExportError(f"decode: ids {ids[:16]} give {ours!r}, the ranks of {RANKS} give {theirs!r}")
