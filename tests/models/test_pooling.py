"""Pooling of video frames against LLaVA-NeXT-Video's pooler and LLaVA-OneVision's `apply_pooling`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.models.connectors import CAUGHT, assert_equal, connector_contract, copy_weights, export, prepare
from torch import Tensor, nn
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from bridgeport.errors import CheckpointError, InputError
from bridgeport.models.pooling import POOLING_MODES, BilinearPooling, WindowPooling


def frames(count: int, side: int, width: int) -> Tensor:
    return torch.randn(count, side * side, width, generator=torch.Generator().manual_seed(side))


def pooler(side: int, width: int, mode: str, stride: int, output_width: int) -> nn.Module:
    """transformers' pooler."""
    vision = SimpleNamespace(image_size=14 * side, patch_size=14, hidden_size=width)
    make: Any = LlavaNextVideoPooler
    made: nn.Module = make(
        SimpleNamespace(
            spatial_pool_mode=mode,
            spatial_pool_stride=stride,
            spatial_pool_out_channels=output_width,
            vision_config=vision,
        )
    )
    return made


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize(("side", "width", "stride"), [(4, 12, 2), (7, 9, 2), (7, 16, 3)])
@torch.no_grad()
def test_windows_equal_transformers(mode: str, side: int, width: int, stride: int) -> None:
    theirs = prepare(pooler(side, width, mode, stride, 11), side)
    ours = WindowPooling((side, side), mode=mode, stride=stride, width=width, output_width=11)
    copy_weights(theirs, ours)
    x = frames(3, side, width)
    want = theirs(x)
    assert_equal(ours(x), want)
    rows, columns = ours.output_grid
    assert want.shape[1] == rows * columns == (side // stride) ** 2
    mixed = x.reshape(3, side, side, width).transpose(1, 2).flatten(1, 2)
    assert (ours(mixed) - want).abs().max() > CAUGHT


@pytest.mark.parametrize(("side", "width"), [(4, 12), (7, 5), (27, 3), (1, 4)])
@torch.no_grad()
def test_bilinear_equals_transformers(side: int, width: int) -> None:
    apply_pooling: Any = LlavaOnevisionModel.apply_pooling
    vision = SimpleNamespace(image_size=14 * side, patch_size=14)
    x, ours = frames(3, side, width), BilinearPooling((side, side))
    want = apply_pooling(SimpleNamespace(config=SimpleNamespace(vision_config=vision)), x)
    assert_equal(ours(x), want)
    assert want.shape[1] == ours.output_grid[0] * ours.output_grid[1] == ((side + 1) // 2) ** 2


@pytest.mark.parametrize(
    "pooling",
    [
        BilinearPooling((5, 7)),
        WindowPooling((5, 7), mode="average"),
        pytest.param(WindowPooling((5, 7), mode="max"), marks=pytest.mark.slow),
        pytest.param(WindowPooling((5, 7), mode="conv", width=6, output_width=6), marks=pytest.mark.slow),
    ],
    ids=["bilinear", "average", "max", "conv"],
)
def test_exports_with_frames_dynamic(pooling: BilinearPooling | WindowPooling, tmp_path: Path) -> None:
    tokens = pooling.output_grid[0] * pooling.output_grid[1]
    contract = connector_contract({"image_embeds": ("frames", 35, 6)}, ("frames", tokens, 6))
    export(prepare(pooling, 2), contract, tmp_path)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(CheckpointError, match="spatial_pool_mode 'median' is unknown; known are average, max, conv"):
        WindowPooling((4, 4), mode="median")
    with pytest.raises(CheckpointError, match="spatial_pool_stride 5 does not fit a grid of 4 x 4 tokens"):
        WindowPooling((4, 4), stride=5)
    with pytest.raises(InputError, match="15 tokens do not form the grid of 4 x 4"):
        BilinearPooling((4, 4))(torch.zeros(1, 15, 2))
