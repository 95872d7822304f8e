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
KEPT = "<|kept for pictures|>"
# A picture of three features, and one with texts around two rows of its features.
PICTURE = (3,)
TILES = ("[", 2, "|", 1, "]")


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Bytes as ids (sorted alphabet of byte-level BPE), BOS 256 first, EOS 257; 258 is kept for pictures."""
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>"), AddedToken(KEPT)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return tokenizer


def contract(*segments: Any, **changes: Any) -> PromptContract:
    return PromptContract(
        segments=segments or (ImageSegment(), TextSegment(add_special_tokens=True)),
        image_token_id=IMAGE,
        image_token="<image>",
        placeholder=KEPT,
        **changes,
    )


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[symbol] for symbol in text.replace(" ", "\u0120")]


def test_placeholders_then_bos_then_text(tokenizer: Tokenizer) -> None:
    encoded = tokenize_prompt(tokenizer, contract(), "a cat", [PICTURE])
    assert encoded.input_ids == [IMAGE] * 3 + [256, *ids_of(tokenizer, "a cat")]
    assert encoded.image_positions == [0, 1, 2]


def test_an_empty_prompt_is_bos_alone(tokenizer: Tokenizer) -> None:
    assert tokenize_prompt(tokenizer, contract(), "", [PICTURE]).input_ids == [IMAGE, IMAGE, IMAGE, 256]


def test_segments_order_and_template(tokenizer: Tokenizer) -> None:
    parts = (
        TextSegment(template="U:", add_special_tokens=True),
        ImageSegment(),
        TextSegment(template="<{prompt}>{x}", add_special_tokens=False),
    )
    encoded = tokenize_prompt(tokenizer, contract(*parts), "{0} {prompt}", [PICTURE])
    head = [256, *ids_of(tokenizer, "U:")]
    assert encoded.image_positions == [3, 4, 5]
    assert encoded.input_ids == head + [IMAGE] * 3 + ids_of(tokenizer, "<{0} {prompt}>{x}")


@pytest.mark.parametrize("text", ["<image>", "a<image>b", "<image><image><image> <s"])
def test_literal_placeholder_text_stays_text(tokenizer: Tokenizer, text: str) -> None:
    encoded = tokenize_prompt(tokenizer, contract(), text, [PICTURE])
    assert encoded.input_ids[3:] == [256, *ids_of(tokenizer, text)]
    assert encoded.image_positions == [0, 1, 2]


def test_the_kept_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"the text that this bundle keeps for pictures \(token 258\)"):
        tokenize_prompt(tokenizer, contract(), f"x {KEPT}", [PICTURE])


def test_too_long_a_prompt_says_both_counts(tokenizer: Tokenizer) -> None:
    assert len(tokenize_prompt(tokenizer, contract(), "a" * 12, [PICTURE], context_length=16).input_ids) == 16
    with pytest.raises(InputError, match=r"takes 17 tokens \(with 3 for pictures\).*context is 16; shorten"):
        tokenize_prompt(tokenizer, contract(), "a" * 13, [PICTURE], context_length=16)


def test_bad_prompts(tokenizer: Tokenizer) -> None:
    prompt: Any = 3
    with pytest.raises(InputError, match="a prompt must be a string, got int"):
        tokenize_prompt(tokenizer, contract(), prompt, [PICTURE])
    with pytest.raises(InputError, match="not valid Unicode") as caught:
        tokenize_prompt(tokenizer, contract(), "a\ud800b", [PICTURE])
    assert "\n" not in str(caught.value)


def test_a_contract_without_a_place_for_the_picture(tokenizer: Tokenizer) -> None:
    with pytest.raises(BundleError, match="has 0 image tokens where its pictures give 3 features"):
        tokenize_prompt(tokenizer, contract(TextSegment(add_special_tokens=True)), "a", [PICTURE])


CHAT: dict[str, Any] = {
    "text_only": (TextSegment(template="U:{prompt}", add_special_tokens=True),),
    "image": "{image};",
    "between": "+",
    "images_per_prompt": 2,
}


def chat(**changes: Any) -> PromptContract:
    return contract(TextSegment(template="U:{images}{prompt} A:", add_special_tokens=True), **{**CHAT, **changes})


def with_pictures(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text`, in which # is one image token."""
    pieces = [ids_of(tokenizer, part) for part in text.split("#")]
    return [256, *pieces[0], *(token for part in pieces[1:] for token in (IMAGE, *part))]


def test_a_chat_template_holds_pictures_and_prompt(tokenizer: Tokenizer) -> None:
    encoded = tokenize_prompt(tokenizer, chat(), "why {images}", [PICTURE, TILES])
    assert encoded.input_ids == with_pictures(tokenizer, "U:###;+[##|#];why {images} A:")
    assert encoded.image_positions == [3, 4, 5, 9, 10, 12]


def test_interleaved_pictures_stand_at_their_marks(tokenizer: Tokenizer) -> None:
    encoded = tokenize_prompt(tokenizer, chat(), "{image}a{image}b", [PICTURE, TILES], interleave=True)
    assert encoded.input_ids == with_pictures(tokenizer, "U:###;a[##|#];b A:")
    plain = tokenize_prompt(tokenizer, chat(), "{image}a", [PICTURE])
    assert plain.input_ids == with_pictures(tokenizer, "U:###;{image}a A:")


def test_a_prompt_without_pictures(tokenizer: Tokenizer) -> None:
    assert tokenize_prompt(tokenizer, chat(), "hi").input_ids == with_pictures(tokenizer, "U:hi")
    with pytest.raises(InputError, match="takes no prompt without one; give a picture"):
        tokenize_prompt(tokenizer, contract(), "hi")


@pytest.mark.parametrize(
    ("prompt", "pictures", "message"),
    [
        ("{image}", 2, r"the prompt has 1 \{image\} marks and 2 pictures came; give one mark for each"),
        ("{image}{image}", 1, r"has 2 \{image\} marks and 1 pictures came"),
        ("{image}{image}{image}", 3, "3 pictures came for one prompt; this model takes at most 2"),
    ],
)
def test_marks_and_pictures_must_agree(tokenizer: Tokenizer, prompt: str, pictures: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenize_prompt(tokenizer, chat(), prompt, [PICTURE] * pictures, interleave=True)


def test_a_model_with_the_picture_in_front_takes_no_marks(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="takes its picture before the prompt; leave interleave"):
        tokenize_prompt(tokenizer, contract(), "{image}", [PICTURE], interleave=True)


def test_decode_leaves_special_tokens_out(tokenizer: Tokenizer) -> None:
    ids = [256, *ids_of(tokenizer, "a cat"), IMAGE, 257]
    assert decode(tokenizer, ids) == "a cat"


def test_load_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    assert tokenize_prompt(load_tokenizer(file), contract(), "x", [PICTURE]) == tokenize_prompt(
        tokenizer, contract(), "x", [PICTURE]
    )
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
