"""Qwen2-VL and Qwen2.5-VL patches, their places and windows, and prompts equal transformers' own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from transformers import Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from bridgeport.errors import InputError
from bridgeport.image_contract import Patches
from bridgeport.runtime.processor.picture import prepare_picture
from bridgeport.runtime.processor.tiling.patches import smart_resize, token_rows, window_order

TOKEN = "<|image_pad|>"
TEXTS = (TOKEN, f"<|vision_start|>{TOKEN}<|vision_end|>What is this?", f"two {TOKEN}{TOKEN}", "no picture")
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"patch_size": 5, "merge_size": 3, "temporal_patch_size": 1},
    {"merge_size": 1, "min_pixels": 900, "max_pixels": 1000},
)


def tiling(**changes: Any) -> Patches:
    wanted: dict[str, Any] = {
        "patch_size": 7,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 28 * 28,
        "max_pixels": 9000,
    }
    return Patches(**wanted | {"resample": "bicubic"} | changes)


def their_images(of: Patches) -> Any:
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": of.min_pixels, "longest_edge": of.max_pixels},
        patch_size=of.patch_size,
        temporal_patch_size=of.temporal_patch_size,
        merge_size=of.merge_size,
        image_mean=list(MEAN),
        image_std=list(STD),
    )


@pytest.mark.parametrize("changes", SHAPES)
def test_patches_equal_transformers(changes: dict[str, Any]) -> None:
    processor = their_images(tiling(**changes))
    for width, height in SIZES:
        ours = prepare_picture(noise(width, height), contract_of(tiling(**changes)))
        theirs = processor(noise(width, height), return_tensors="np")
        groups = (len(ours.rows), tiling(**changes).merge_size ** 2)
        pixels = theirs["pixel_values"].reshape(*groups, -1)
        assert_close(ours.tensors["pixel_values"], pixels, f"pixel_values of {width}x{height}")
        assert_close(ours.tensors["image_grid_thw"], theirs["image_grid_thw"], f"grid of {width}x{height}")
        assert ours.tensors["pixel_values"].flags.c_contiguous
        grid = torch.from_numpy(theirs["image_grid_thw"])
        places = get_vision_position_ids(grid, tiling(**changes).merge_size).numpy().reshape(*groups, 2)
        assert_close(ours.tensors["rotary_position_ids"], places, f"places in {width}x{height}")
        assert ours.pieces == (len(ours.rows),)
        assert "window_index" not in ours.tensors


@pytest.mark.parametrize("window", [28, 42, 55, 9999])
def test_windows_equal_transformers(window: int) -> None:
    of = tiling(window_size=window)
    for width, height in SIZES:
        ours = prepare_picture(noise(width, height), contract_of(of)).tensors
        grid = torch.from_numpy(ours["image_grid_thw"])
        index, boundaries = get_vision_window_index(grid, of.merge_size, window, of.patch_size)
        assert_close(ours["window_index"], index.numpy(), f"window_index of {width}x{height}")
        assert_close(ours["inverse_window_index"], torch.argsort(index).numpy(), f"inverse of {width}x{height}")
        lengths = np.diff(boundaries.numpy())
        theirs = np.repeat(np.arange(len(lengths)), lengths).reshape(-1, of.merge_size**2)
        assert_close(ours["window_ids"], theirs, f"window_ids of {width}x{height}")


def test_golden_windows() -> None:
    """By hand: 2 x 3 groups in windows of 2 x 2: a full window, then the third column's two groups."""
    index, ids = window_order(4, 6, tiling(window_size=28))
    assert index.tolist() == [0, 1, 3, 4, 2, 5]
    assert ids.tolist() == [[0] * 4] * 4 + [[1] * 4] * 2


@pytest.mark.parametrize("stride", [1, 2, 3, 5, 10**30])
def test_pooled_rows_equal_torch(stride: int) -> None:
    """Also where the stride divides neither edge, and where it is longer than both."""
    of = tiling(pool_stride=stride)
    grids = set()
    for width, height in SIZES:
        ours = prepare_picture(noise(width, height), contract_of(of))
        plain = prepare_picture(noise(width, height), contract_of(tiling()))
        rows, columns = (int(n) // of.merge_size for n in ours.tensors["image_grid_thw"][0][1:])
        grids.add((rows, columns))
        features = np.random.default_rng(1).standard_normal((rows * columns, 5)).astype(np.float32)
        table = torch.from_numpy(features).T.reshape(1, 5, rows, columns)
        # torch takes no window that is longer than the picture.
        window = (min(stride, rows), min(stride, columns))
        theirs = F.avg_pool2d(table, window, ceil_mode=True, count_include_pad=False)[0].flatten(1).T.numpy()
        weights = np.ones((len(ours.rows), 1), np.float32) if ours.weights is None else ours.weights
        mixed = np.einsum("tkd,tk->td", features[ours.rows.reshape(len(weights), -1)], weights)
        assert_close(mixed, theirs, f"features of {width}x{height}")
        assert ours.pieces == (len(theirs),) == (math.ceil(rows / stride) * math.ceil(columns / stride),)
        # What the vision tower reads stays.
        assert all(np.array_equal(ours.tensors[name], plain.tensors[name]) for name in plain.tensors)
    assert any(rows % 2 and columns % 2 for rows, columns in grids)


def test_golden_pooled_rows() -> None:
    """By hand: 3 x 3 features in windows of 2 x 2; of the last one a single feature is left."""
    rows, weights = token_rows((3, 3), 2)
    assert weights is not None
    found = [
        {int(row): float(part) for row, part in zip(*pair, strict=True) if part}
        for pair in zip(rows, weights, strict=True)
    ]
    assert found == [{0: 0.25, 1: 0.25, 3: 0.25, 4: 0.25}, {2: 0.5, 5: 0.5}, {6: 0.5, 7: 0.5}, {8: 1.0}]


@pytest.mark.parametrize(
    ("size", "expected"),
    # By hand, edges in multiples of 14, 784 to 9000 pixels: grown, halves rounded to even, at the limit, shrunk.
    [((1, 1), (28, 28)), ((35, 49), (28, 56)), ((90, 100), (84, 98)), ((400, 400), (84, 84)), ((3, 600), (14, 406))],
)
def test_golden_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*size, tiling()) == expected


def test_prompts_equal_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(TOKEN, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    processor = without_video(
        monkeypatch, Qwen2VLProcessor, image_processor=their_images(tiling()), tokenizer=tokenizer
    )
    for text in TEXTS:
        for width, height in ((1, 1), (37, 53), (200, 1)):
            pictures = [noise(width, height)] * text.count(TOKEN)
            theirs = processor(images=pictures or None, text=[text])["input_ids"][0]
            prepared = [prepare_picture(picture, contract_of(tiling())) for picture in pictures]
            assert tokenizer(expand(text, TOKEN, prepared))["input_ids"] == list(theirs), f"{text!r} {width}x{height}"


@pytest.mark.parametrize(
    "fault", [{"resample": "bilinear"}, {"min_pixels": 9000}, {"max_pixels": 2000}, {"merge_size": 1}]
)
def test_a_wrong_contract_shows(fault: dict[str, Any]) -> None:
    theirs = their_images(tiling())(noise(97, 41), return_tensors="np")["pixel_values"]
    ours = prepare_picture(noise(97, 41), contract_of(tiling(**fault))).tensors["pixel_values"]
    assert differs(ours.reshape(-1, ours.shape[-1]), theirs)


@pytest.mark.parametrize("size", [(1, 201), (402, 2), (1, 100000)])
def test_a_strip_is_refused_as_transformers_does(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        their_images(tiling())(noise(*size))
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]} pixels.*aspect ratio.*up to 200") as caught:
        prepare_picture(noise(*size), contract_of(tiling()))
    assert "\n" not in str(caught.value)
