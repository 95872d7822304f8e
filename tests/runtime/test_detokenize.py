"""Streaming text: pieces that join to the whole, no character ever cut."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from bridgeport.runtime.detokenize import IncrementalDetokenizer

TEXTS = ("a red square, left of a blue disc.", "naïve café 日本語: 🦜🦜 done", " two  spaces ", "")


def byte_level() -> Tokenizer:
    """GPT-2's kind, as OPT has: bytes as tokens, so characters are cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["</s>"],
    )
    tokenizer.train_from_iterator(["a red square, a red disc"] * 3, trainer)
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Llama's kind: spaces as a mark before the word, the first one dropped on decoding, bytes where needed."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=330, show_progress=False, special_tokens=["<unk>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    )  # fmt: skip
    tokenizer.train_from_iterator(["▁a▁red▁square,▁a▁red▁disc▁."] * 3, trainer)
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text).ids
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids)


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("é!").ids
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push(token) for token in ids] == ["", "é", "!"]


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_any_tokens_whatever_they_spell(make: Callable[[], Tokenizer]) -> None:
    """Random tokens are broken UTF-8 for the most part; the pieces still join to what decoding the whole gives."""
    tokenizer = make()
    generator = np.random.default_rng(0)
    for _ in range(60):
        ids = generator.integers(0, tokenizer.get_vocab_size(), 24).tolist()
        detokenizer = IncrementalDetokenizer(tokenizer)
        text = "".join(detokenizer.push(token) for token in ids) + detokenizer.finish()
        assert text == tokenizer.decode(ids), ids


def test_special_tokens_are_left_out() -> None:
    tokenizer = byte_level()
    stop = tokenizer.token_to_id("</s>")
    assert stop is not None
    ids = [*tokenizer.encode("red").ids, stop]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(detokenizer.push(token) for token in ids) + detokenizer.finish() == "red"
