"""Prompts become ids and positions by the contract alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from bridgeport.errors import BundleError, InputError
from bridgeport.manifest import ImageSegment, PromptContract, TextSegment
from bridgeport.runtime.processor import decode, load_tokenizer, tokenize_prompt

IMAGE = 258


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Bytes as ids (sorted alphabet of byte-level BPE), BOS 256 first, EOS 257; 258 is kept for pictures."""
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>"), AddedToken("<|kept for pictures|>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return tokenizer


def contract(*segments: Any, tokens_per_image: int = 3) -> PromptContract:
    return PromptContract(
        segments=segments or (ImageSegment(), TextSegment(add_special_tokens=True)),
        image_token_id=IMAGE,
        image_token="<image>",
        tokens_per_image=tokens_per_image,
    )


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[symbol] for symbol in text.replace(" ", "\u0120")]


def test_placeholders_then_bos_then_text(tokenizer: Tokenizer) -> None:
    encoded = tokenize_prompt(tokenizer, contract(), "a cat")
    assert encoded.input_ids == [IMAGE] * 3 + [256, *ids_of(tokenizer, "a cat")]
    assert encoded.image_positions == slice(0, 3)


def test_an_empty_prompt_is_bos_alone(tokenizer: Tokenizer) -> None:
    assert tokenize_prompt(tokenizer, contract(), "").input_ids == [IMAGE, IMAGE, IMAGE, 256]


def test_segments_order_and_template(tokenizer: Tokenizer) -> None:
    parts = (
        TextSegment(template="U:", add_special_tokens=True),
        ImageSegment(),
        TextSegment(template="<{prompt}>{x}", add_special_tokens=False),
    )
    encoded = tokenize_prompt(tokenizer, contract(*parts), "{0} {prompt}")
    head = [256, *ids_of(tokenizer, "U:")]
    assert encoded.image_positions == slice(3, 6)
    assert encoded.input_ids == head + [IMAGE] * 3 + ids_of(tokenizer, "<{0} {prompt}>{x}")


@pytest.mark.parametrize("text", ["<image>", "a<image>b", "<image><image><image> <s"])
def test_literal_placeholder_text_stays_text(tokenizer: Tokenizer, text: str) -> None:
    encoded = tokenize_prompt(tokenizer, contract(), text)
    assert encoded.input_ids[3:] == [256, *ids_of(tokenizer, text)]
    assert encoded.image_positions == slice(0, 3)


def test_the_kept_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="the text of token 258, which this bundle keeps for pictures"):
        tokenize_prompt(tokenizer, contract(), "x <|kept for pictures|>")


def test_too_long_a_prompt_says_both_counts(tokenizer: Tokenizer) -> None:
    assert len(tokenize_prompt(tokenizer, contract(), "a" * 12, context_length=16).input_ids) == 16
    with pytest.raises(InputError, match=r"takes 17 tokens \(with 3 for the picture\).*context is 16; shorten"):
        tokenize_prompt(tokenizer, contract(), "a" * 13, context_length=16)


def test_bad_prompts(tokenizer: Tokenizer) -> None:
    prompt: Any = 3
    with pytest.raises(InputError, match="a prompt must be a string, got int"):
        tokenize_prompt(tokenizer, contract(), prompt)
    with pytest.raises(InputError, match="not valid Unicode") as caught:
        tokenize_prompt(tokenizer, contract(), "a\ud800b")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", [0, 2])
def test_one_image_segment_only(tokenizer: Tokenizer, images: int) -> None:
    parts = (*(ImageSegment() for _ in range(images)), TextSegment(add_special_tokens=True))
    with pytest.raises(BundleError, match=f"has {images} image segments; this version runs one"):
        tokenize_prompt(tokenizer, contract(*parts), "a")


def test_decode_leaves_special_tokens_out(tokenizer: Tokenizer) -> None:
    ids = [256, *ids_of(tokenizer, "a cat"), IMAGE, 257]
    assert decode(tokenizer, ids) == "a cat"


def test_load_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    assert tokenize_prompt(load_tokenizer(file), contract(), "x") == tokenize_prompt(tokenizer, contract(), "x")
    file.write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(file)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, bridgeport.runtime.processor; "
        "print(sorted({'torch', 'transformers', 'onnx', 'safetensors'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
