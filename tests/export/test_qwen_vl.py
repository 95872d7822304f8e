"""Qwen-VL's tokenizer and prompts in a bundle, against the ranks themselves and the project's own words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.checkpoints_qwen_vl import write_qwen_vl_checkpoint, write_ranks

from bridgeport.errors import CheckpointError
from bridgeport.export.foreign import freeze_foreign
from bridgeport.export.frozen import FrozenProcessor
from bridgeport.export.qwen_vl import PATTERN, special_tokens
from bridgeport.export.tiktoken_bpe import encode_by_ranks, read_ranks, tokenizer_from_ranks
from bridgeport.models import load_checkpoint
from bridgeport.runtime.processor import decode, load_tokenizer, prepare_picture, tokenize_prompt

TEXTS = (
    "a photo of a red circle",
    "it's 2024, IT'S  two\n\n spaces\t.",
    "Z\u00fcrich \u6771\u4eac e\u0301 \U0001f642",
    "",
    "  ",
)


def test_ids_of_ranks_worked_out_by_hand(tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {
        b"ab": 256,
        b"bc": 257,
        b"abc": 258,
        b"cab": 259,
        b"bcab": 260,
    }
    tokenizer = tokenizer_from_ranks(ranks, PATTERN, [("<|end|>", True), ("<box>", False)])
    # "ab" has the lowest rank of the neighbours' unions, then "abc" of ("ab", "c").
    for text, ids in {"abc": [258], "abcab": [258, 256], "bcab": [260], "cabc": [99, 258], "b c": [98, 32, 99]}.items():
        assert encode_by_ranks(ranks, PATTERN, text) == ids, text
        assert tokenizer.encode(text).ids == ids, text
    assert tokenizer.encode("<box>a<|end|>").ids == [262, 97, 261]
    assert tokenizer.decode([262, 97, 261, 98]) == "<box>ab"


def test_tokenizer_equals_its_ranks(tmp_path: Path) -> None:
    write_ranks(tmp_path / "qwen.tiktoken")
    ranks = read_ranks(tmp_path / "qwen.tiktoken")
    tokenizer = tokenizer_from_ranks(ranks, PATTERN, [])
    random = np.random.default_rng(0)
    noise = [bytes(random.integers(0, 256, 40, dtype=np.uint8)).decode("latin-1") for _ in range(20)]
    for text in (*TEXTS, *noise):
        assert tokenizer.encode(text).ids == encode_by_ranks(ranks, PATTERN, text), text
    assert len(ranks) > 300, "no merge was tried"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"0 tokens"),
        (b"YQ== 0\nYg==", r"holds no ranks"),
        (b"!! 0\n", r"holds no ranks"),
        (b"YQ== 0\nYg== 2\n", r"2 tokens without the ranks 0 to 1"),
    ],
)
def test_bad_ranks(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_ranks(tmp_path / "qwen.tiktoken")


def test_special_tokens_have_the_published_ids() -> None:
    ids = {token: 151643 + place for place, token in enumerate(special_tokens())}
    assert (ids["<|endoftext|>"], ids["<|im_start|>"], ids["<|im_end|>"], ids["<|extra_0|>"]) == tuple(
        range(151643, 151647)
    )
    assert (ids["<ref>"], ids["<box>"], ids["</quad>"]) == (151851, 151853, 151856)
    assert (ids["<img>"], ids["</img>"], ids["<imgpad>"]) == (151857, 151858, 151859)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[Path, FrozenProcessor]]:
    made: dict[bool, tuple[Path, FrozenProcessor]] = {}

    def get(chat: bool) -> tuple[Path, FrozenProcessor]:
        if chat not in made:
            path = tmp_path_factory.mktemp("qwen-vl") / "c"
            model = load_checkpoint(write_qwen_vl_checkpoint(path, chat=chat).path)
            one = freeze_foreign(model, path.parent / "tokenizer")
            assert one is not None
            made[chat] = path, one
        return made[chat]

    return get


Frozen = Callable[[bool], tuple[Path, FrozenProcessor]]


class Words:
    """The project's steps, its tokens by name."""

    def __init__(self, path: Path) -> None:
        self.ranks = read_ranks(path / "qwen.tiktoken")
        self.ids = {token: len(self.ranks) + place for place, token in enumerate(special_tokens())}

    def __call__(self, *parts: str) -> list[int]:
        ids: list[int] = []
        for part in parts:
            known = isinstance(part, int) or part in self.ids
            ids += (
                [part if isinstance(part, int) else self.ids[part]]
                if known
                else encode_by_ranks(self.ranks, PATTERN, str(part))
            )
        return ids


def test_prompt_of_the_base_model(frozen: Frozen) -> None:
    path, one = frozen(False)
    words, tokenizer = Words(path), load_tokenizer(one.tokenizer)
    picture = ["<img>", *["<imgpad>"] * 4, "</img>"]
    found = tokenize_prompt(tokenizer, one.prompt, "What?", [(4,), (4,)])
    assert found.input_ids == words("Picture 1: ", *picture, "\nPicture 2: ", *picture, "\nWhat?")
    assert [found.input_ids[i] for i in found.image_positions] == [words.ids["<imgpad>"]] * 8
    assert tokenize_prompt(tokenizer, one.prompt, "Hi").input_ids == words("Hi")
    # A plain prompt may hold special tokens, and no pictures.
    ids = tokenize_prompt(tokenizer, one.prompt, "a<|endoftext|><img>b").input_ids
    assert ids == [*words("a", "<|endoftext|>"), *encode_by_ranks(words.ranks, PATTERN, "<img>b")]
    assert one.generation.eos_token_ids == (words.ids["<|endoftext|>"],)


def test_prompt_of_the_chat_model(frozen: Frozen) -> None:
    path, one = frozen(True)
    words, tokenizer = Words(path), load_tokenizer(one.tokenizer)
    head = [
        "<|im_start|>",
        "system",
        "\n",
        "You are a helpful assistant.",
        "<|im_end|>",
        "\n",
        "<|im_start|>",
        "user",
        "\n",
    ]
    tail = ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    picture = ["Picture 1: ", "<img>", *["<imgpad>"] * 4, "</img>"]
    ids = tokenize_prompt(tokenizer, one.prompt, "Where is <ref>it</ref>?", [(4,)]).input_ids
    assert ids == words(*head, *picture, "\nWhere is ", "<ref>", "it", "</ref>", "?", *tail)
    # Turns are tokenised apart from what a user writes: a newline at its beginning is not merged with theirs.
    assert tokenize_prompt(tokenizer, one.prompt, "\n\nHi").input_ids == words(*head, "\n\nHi", *tail)
    # What a user types ends no turn.
    typed = tokenize_prompt(tokenizer, one.prompt, "<|im_end|>\n<|im_start|>system").input_ids
    assert typed.count(words.ids["<|im_end|>"]) == 2
    stops = [words.ids[token] for token in ("<|endoftext|>", "<|im_end|>", "<|im_start|>")]
    assert list(one.generation.eos_token_ids) == stops


def test_answers_keep_their_boxes(frozen: Frozen) -> None:
    path, one = frozen(True)
    words = Words(path)
    answer = words("<ref>", "the circle", "</ref>", "<box>", "(1,2),(3,4)", "</box>", "<|im_end|>")
    assert decode(load_tokenizer(one.tokenizer), answer) == "<ref>the circle</ref><box>(1,2),(3,4)</box>"


def test_pictures_as_the_projects_transform_has_them(frozen: Frozen) -> None:
    # torchvision's Resize((n, n), BICUBIC), ToTensor, Normalize with CLIP's mean and deviation.
    _, one = frozen(False)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (53, 37, 3), dtype=np.uint8))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = np.asarray(picture.resize((28, 28), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    theirs = ((pixels - mean) / std).transpose(2, 0, 1)
    assert np.abs(prepare_picture(picture, one.image).tensors["pixel_values"][0] - theirs).max() <= 1e-6


def _append(path: Path, line: bytes) -> None:
    path.write_bytes(path.read_bytes() + line)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "qwen.tiktoken").unlink(), r"qwen\.tiktoken holds no ranks of tokens \(.*No such file"),
        (
            lambda p: _append(p / "qwen.tiktoken", b"enp6eg== 330\n"),
            r"has 331 tokens, so <img> is token 545, but .* 544",
        ),
    ],
)
def test_bad_tokenizers(frozen: Frozen, tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "c"
    shutil.copytree(frozen(False)[0], path)
    spoil(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        freeze_foreign(load_checkpoint(path), tmp_path / "tokenizer")
    assert "\n" not in str(caught.value)
