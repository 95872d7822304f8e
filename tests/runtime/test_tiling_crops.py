"""InternVL pictures and prompts equal transformers' own."""

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
from transformers import InternVLProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from bridgeport.image_contract import Crops
from bridgeport.runtime.processor.picture import prepare_picture
from bridgeport.runtime.processor.tiling.crops import choose_grid

TOKEN = "<IMG_CONTEXT>"
TEXTS = (TOKEN, f"{TOKEN}\nWhat is this?", f"two {TOKEN}{TOKEN} <img>", "no picture")


def tiling(**changes: Any) -> Crops:
    wanted: dict[str, Any] = {
        "tokens": 4,
        "height": 16,
        "width": 16,
        "min_tiles": 1,
        "max_tiles": 12,
        "resample": "bicubic",
    }
    return Crops(**wanted | changes)


def their_images(of: Crops, **options: Any) -> Any:
    return GotOcr2ImageProcessorPil(
        size={"height": of.height, "width": of.width},
        image_mean=list(MEAN),
        image_std=list(STD),
        **{"crop_to_patches": True, "min_patches": of.min_tiles, "max_patches": of.max_tiles} | options,
    )


@pytest.mark.parametrize("changes", [{}, {"max_tiles": 1}, {"height": 20, "min_tiles": 3, "max_tiles": 7}])
def test_tiles_equal_transformers(changes: dict[str, Any]) -> None:
    processor = their_images(tiling(**changes))
    for width, height in SIZES:
        ours = prepare_picture(noise(width, height), contract_of(tiling(**changes)))
        theirs = processor(noise(width, height), return_tensors="np")
        assert_close(ours.tensors["pixel_values"], theirs["pixel_values"], f"{width}x{height}")
        assert ours.rows.tolist() == list(range(int(theirs["num_patches"][0]) * 4))
        assert ours.pieces == ("<img>", len(ours.rows), "</img>")


@pytest.mark.parametrize(
    "changes", [{}, {"min_tiles": 2, "max_tiles": 6}, {"height": 10, "min_tiles": 5, "max_tiles": 5}]
)
def test_grids_equal_transformers(changes: dict[str, Any]) -> None:
    of = tiling(**changes)
    for width in range(1, 100, 3):
        for height in (1, 2, 7, 16, 31, 32, 48, 64, 99, 3000):
            theirs = get_optimal_tiled_canvas((height, width), (of.height, of.width), of.min_tiles, of.max_tiles)
            assert choose_grid(width, height, of) == theirs, f"{width}x{height}"


def test_golden_grids() -> None:
    """By hand: 2:1 is the shape of 2x1 and 4x2 tiles; the larger grid is for a picture of more than half its pixels."""
    assert choose_grid(2, 1, tiling()) == (2, 1)
    assert choose_grid(46, 23, tiling()) == (4, 2)
    assert choose_grid(45, 22, tiling()) == (2, 1)
    assert choose_grid(1, 200, tiling()) == (1, 12)


def test_prompts_equal_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token=TOKEN, video_token="<video>"
    )
    # The whole processor cuts, whatever its image processor's own setting is.
    images = their_images(tiling(), crop_to_patches=False)
    processor = without_video(
        monkeypatch, InternVLProcessor, image_processor=images, tokenizer=tokenizer, image_seq_length=4
    )
    for text in TEXTS:
        for width, height in ((1, 1), (37, 53), (97, 41)):
            pictures = [noise(width, height)] * text.count(TOKEN)
            theirs = processor(images=pictures or None, text=[text])["input_ids"][0]
            prepared = [prepare_picture(picture, contract_of(tiling())) for picture in pictures]
            assert tokenizer(expand(text, TOKEN, prepared))["input_ids"] == list(theirs), f"{text!r} {width}x{height}"


@pytest.mark.parametrize(
    ("fault", "size"),
    [
        ({"resample": "bilinear"}, (96, 32)),
        ({"max_tiles": 5}, (96, 32)),
        ({"min_tiles": 7}, (20, 20)),
        ({"height": 15}, (96, 32)),
    ],
)
def test_a_wrong_contract_shows(fault: dict[str, Any], size: tuple[int, int]) -> None:
    theirs = their_images(tiling())(noise(*size), return_tensors="np")["pixel_values"]
    assert differs(prepare_picture(noise(*size), contract_of(tiling(**fault))).tensors["pixel_values"], theirs)
