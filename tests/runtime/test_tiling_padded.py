"""Idefics2 pictures, batches and prompts equal transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.runtime.tilings import MEAN, SIZES, STD, assert_close, byte_tokenizer, contract_of, differs, expand, noise
from transformers import Idefics2Processor
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from bridgeport.errors import InputError
from bridgeport.image_contract import Padded
from bridgeport.runtime.processor.picture import prepare_picture
from bridgeport.runtime.processor.text import join_boundaries
from bridgeport.runtime.vision import _stack

TEXTS = (
    "<image>",
    "User:<image>What is this?",
    "word<image> a space, <image><image>next\nand<image>\n<image>, <tag>",
    "<image><tag> typed <fake_token_around_image><fake_token_around_image>x",
    "no picture",
)
NAMES = ("pixel_values", "pixel_attention_mask")


def tiling(**changes: Any) -> Padded:
    wanted: dict[str, Any] = {"tokens": 4, "shortest_edge": 24, "longest_edge": 60, "resample": "bilinear"}
    return Padded(**wanted | {"splitting": False} | changes)


def their_images(of: Padded) -> Any:
    return Idefics2ImageProcessorPil(
        size={"shortest_edge": of.shortest_edge, "longest_edge": of.longest_edge},
        do_image_splitting=of.splitting,
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def sizes(of: Padded) -> list[tuple[int, int]]:
    return [size for size in SIZES if min(size) > 1 or not of.splitting]


@pytest.mark.parametrize("changes", [{}, {"splitting": True}, {"shortest_edge": 37, "longest_edge": 91}])
def test_tiles_equal_transformers(changes: dict[str, Any]) -> None:
    processor = their_images(tiling(**changes))
    for width, height in sizes(tiling(**changes)):
        ours = prepare_picture(noise(width, height), contract_of(tiling(**changes)))
        theirs = processor(noise(width, height), return_tensors="np")
        for name in NAMES:
            assert_close(ours.tensors[name], theirs[name][0], f"{name} of {width}x{height}")
        assert ours.rows.tolist() == list(range(len(ours.tensors["pixel_values"]) * 4))
        assert sum(piece for piece in ours.pieces if isinstance(piece, int)) == len(ours.rows)


@pytest.mark.parametrize("splitting", [False, True])
def test_a_batch_equals_transformers(splitting: bool) -> None:
    """Padded to the largest of all: the masks differ from those of each picture alone."""
    of = tiling(splitting=splitting)
    pictures = [noise(*size) for size in ((37, 53), (97, 41), (64, 64), (13, 11))]
    theirs = their_images(of)([[picture] for picture in pictures], return_tensors="np")
    alone = [prepare_picture(picture, contract_of(of)) for picture in pictures]
    for name in NAMES:
        ours = _stack([picture.tensors[name] for picture in alone])
        assert_close(ours, np.concatenate(theirs[name]), name)
        assert differs(ours[:1], alone[0].tensors[name][:1])


@pytest.mark.parametrize("splitting", [False, True])
def test_prompts_equal_transformers(splitting: bool) -> None:
    of = tiling(splitting=splitting)
    tokenizer = byte_tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>")
    make: Any = Idefics2Processor
    processor = make(image_processor=their_images(of), tokenizer=tokenizer, image_seq_len=of.tokens)
    for text in TEXTS:
        pictures = [noise(9, 7)] * text.count("<image>")
        theirs = processor(images=[pictures] if pictures else None, text=[text])["input_ids"][0]
        prepared = [prepare_picture(picture, contract_of(of)) for picture in pictures]
        expanded = expand(text, "<image>", prepared)
        assert tokenizer(join_boundaries(expanded, of.boundary))["input_ids"] == list(theirs), text
        joins = any(word in text for word in ("What", "next", "typed"))
        assert (tokenizer(expanded)["input_ids"] != list(theirs)) == joins, text


@pytest.mark.parametrize(
    "fault", [{"resample": "bicubic"}, {"shortest_edge": 25}, {"longest_edge": 61}, {"splitting": True}]
)
def test_a_wrong_contract_shows(fault: dict[str, Any]) -> None:
    theirs = their_images(tiling())(noise(97, 13), return_tensors="np")["pixel_values"][0]
    assert differs(prepare_picture(noise(97, 13), contract_of(tiling(**fault))).tensors["pixel_values"], theirs)


def test_padding_is_zero_and_masked() -> None:
    """By hand: quarters of 61x25 are 30x12 and 31x13, every edge under 24 becomes 24; the whole is 60x24."""
    tensors = prepare_picture(noise(61, 25), contract_of(tiling(splitting=True))).tensors
    mask = tensors["pixel_attention_mask"]
    assert mask.shape == (5, 24, 60)
    assert mask.sum(axis=(1, 2)).tolist() == [30 * 24, 31 * 24, 30 * 24, 31 * 24, 60 * 24]
    assert np.abs(tensors["pixel_values"][0, :, :, 30:]).max() == 0.0
    assert np.abs(tensors["pixel_values"][0, :, :, :30]).min() > 0.0


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1)])
def test_no_quarters_of_one_pixel(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]} pixels.*takes 2x2 and larger") as caught:
        prepare_picture(noise(*size), contract_of(tiling(splitting=True)))
    assert "\n" not in str(caught.value)
