"""Idefics3 and SmolVLM pictures and prompts equal transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
from tests.runtime.tilings import (
    MEAN,
    SIZES,
    STD,
    assert_close,
    byte_tokenizer,
    contract_of,
    differs,
    expand,
    noise,
    without_video,
)
from transformers import Idefics3Processor, SmolVLMProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from bridgeport.image_contract import Split
from bridgeport.runtime.processor.picture import prepare_picture
from bridgeport.runtime.processor.tiling.split import MAX_EDGE, resized_size

TEXTS = ("<image>", "User:<image>What is this?", "two <image><image>\n end", "no picture")
SPECIALS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>")


def tiling(**changes: Any) -> Split:
    wanted: dict[str, Any] = {"tokens": 3, "longest_edge": 96, "tile_size": 32, "resample": "lanczos"}
    return Split(**wanted | {"splitting": True} | changes)


def their_images(kind: Any, of: Split) -> Any:
    return kind(
        size={"longest_edge": of.longest_edge},
        max_image_size={"longest_edge": of.tile_size},
        do_image_splitting=of.splitting,
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def their_processor(kind: Any, of: Split, patch: pytest.MonkeyPatch) -> Any:
    tokenizer = byte_tokenizer(*SPECIALS)
    if kind is Idefics3Processor:
        images = their_images(Idefics3ImageProcessorPil, of)
        return Idefics3Processor(image_processor=images, tokenizer=tokenizer, image_seq_len=of.tokens)
    patch.setattr(processing_smolvlm, "num2words", str)
    images = their_images(SmolVLMImageProcessorPil, of)
    return without_video(patch, kind, image_processor=images, tokenizer=tokenizer, image_seq_len=of.tokens)


@pytest.mark.parametrize("changes", [{}, {"longest_edge": 100, "tile_size": 24}, {"splitting": False}])
@pytest.mark.parametrize("kind", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
def test_tiles_equal_transformers(kind: Any, changes: dict[str, Any]) -> None:
    processor = their_images(kind, tiling(**changes))
    for width, height in SIZES:
        ours = prepare_picture(noise(width, height), contract_of(tiling(**changes)))
        theirs = processor(noise(width, height), return_tensors="np")
        for name in ("pixel_values", "pixel_attention_mask"):
            assert_close(ours.tensors[name], theirs[name][0], f"{name} of {width}x{height}")
        assert ours.rows.tolist() == list(range(len(ours.tensors["pixel_values"]) * 3))
        assert sum(piece for piece in ours.pieces if isinstance(piece, int)) == len(ours.rows)


@pytest.mark.parametrize("changes", [{}, {"splitting": False}])
@pytest.mark.parametrize("kind", [Idefics3Processor, SmolVLMProcessor])
def test_prompts_equal_transformers(kind: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    processor = their_processor(kind, tiling(**changes), monkeypatch)
    for text in TEXTS:
        for width, height in ((1, 1), (37, 53), (97, 41)):
            pictures = [noise(width, height)] * text.count("<image>")
            theirs = processor(images=[pictures] if pictures else None, text=[text])["input_ids"][0]
            prepared = [prepare_picture(picture, contract_of(tiling(**changes))) for picture in pictures]
            ours = processor.tokenizer(expand(text, "<image>", prepared))["input_ids"]
            assert ours == list(theirs), f"{text!r} with {width}x{height}"


@pytest.mark.parametrize("fault", [{"resample": "bicubic"}, {"longest_edge": 128}, {"tile_size": 24}])
def test_a_wrong_contract_shows(fault: dict[str, Any]) -> None:
    theirs = their_images(Idefics3ImageProcessorPil, tiling())(noise(97, 41), return_tensors="np")["pixel_values"][0]
    ours = prepare_picture(noise(97, 41), contract_of(tiling(**fault))).tensors["pixel_values"]
    assert differs(ours, theirs)


def test_golden_pieces() -> None:
    """By hand: 2 rows of 1 column; a blank line stands before the whole view."""
    pieces = prepare_picture(noise(32, 64), contract_of(tiling(longest_edge=64, tokens=5))).pieces
    fake = "<fake_token_around_image>"
    assert pieces == (
        f"{fake}<row_1_col_1>", 5, f"\n{fake}<row_2_col_1>", 5, f"\n\n{fake}<global-img>", 5, fake,
    )  # fmt: skip
    single = prepare_picture(noise(8, 8), contract_of(tiling(longest_edge=32))).pieces
    assert single == (f"{fake}<global-img>", 3, fake)


@pytest.mark.parametrize(
    ("width", "height", "edge", "expected"),
    [(1, 10000, 364, (1, 364)), (100, 50, 1456, (1456, 728)), (99, 50, 100, (100, 50)), (100, 30, 8192, (4096, 1229))],
)
def test_resized_sizes(width: int, height: int, edge: int, expected: tuple[int, int]) -> None:
    """By hand; 8192 is over the largest edge, whatever a contract says."""
    assert resized_size(width, height, edge) == expected
    assert max(resized_size(width, height, edge)) <= MAX_EDGE
