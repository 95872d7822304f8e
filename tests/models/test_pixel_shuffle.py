"""Pixel-shuffle connectors against Idefics3's and InternVL's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.models.connectors import CAUGHT, assert_equal, connector_contract, copy_weights, export, prepare
from torch import Tensor, nn
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from bridgeport.errors import CheckpointError, InputError
from bridgeport.models.pixel_shuffle import PixelShuffle, PixelShuffleLinear, PixelShuffleMlp

# side, factor, width, output width
SHAPES = [(4, 2, 12, 20), (6, 3, 7, 16), (8, 4, 5, 33), (3, 1, 8, 8)]
MLP_NAMES = {
    "norm": "layer_norm",
    "mlp.layers.0": "linear_1",
    "mlp.layers.1": "linear_2",
}


def tokens(side: int, width: int) -> Tensor:
    return torch.randn(3, side * side, width, generator=torch.Generator().manual_seed(width))


def transpose_grid(x: Tensor, side: int) -> Tensor:
    """Rows and columns exchanged: what a connector with the wrong order would read."""
    return x.reshape(-1, side, side, x.shape[2]).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize("reference", [Idefics3Connector, SmolVLMConnector])
@pytest.mark.parametrize(("side", "factor", "width", "output_width"), SHAPES)
@torch.no_grad()
def test_linear_equals_idefics3(reference: Any, side: int, factor: int, width: int, output_width: int) -> None:
    config = SimpleNamespace(
        scale_factor=factor,
        vision_config=SimpleNamespace(hidden_size=width),
        text_config=SimpleNamespace(hidden_size=output_width),
    )
    theirs = prepare(reference(config), side)
    ours = PixelShuffleLinear((side, side), factor, width, output_width)
    copy_weights(theirs, ours, {"projection.weight": "modality_projection.proj.weight"})
    x = tokens(side, width)
    want = theirs(x)
    assert_equal(ours(x), want)
    assert (ours(transpose_grid(x, side)) - want).abs().max() > CAUGHT


@pytest.mark.parametrize(("side", "factor", "width", "output_width"), [s for s in SHAPES if s[1] in (1, 2, 4)])
@torch.no_grad()
def test_mlp_equals_internvl(side: int, factor: int, width: int, output_width: int) -> None:
    config: Any = SimpleNamespace(
        downsample_ratio=1 / factor,
        projector_hidden_act="gelu",
        vision_config=SimpleNamespace(hidden_size=width),
        text_config=SimpleNamespace(hidden_size=output_width),
    )
    make: Any = InternVLMultiModalProjector
    theirs = prepare(make(config), side)
    ours = PixelShuffleMlp((side, side), factor, width, output_width)
    parts = ("weight", "bias")
    copy_weights(theirs, ours, {f"{a}.{part}": f"{b}.{part}" for a, b in MLP_NAMES.items() for part in parts})
    x = tokens(side, width)
    shuffle: Any = InternVLModel.pixel_shuffle
    squares = shuffle(None, x.reshape(3, side, side, width), 1 / factor)
    want = theirs(squares.flatten(1, 2))
    assert_equal(ours(x), want)
    assert (ours(transpose_grid(x, side)) - want).abs().max() > CAUGHT


@torch.no_grad()
def test_a_grid_need_not_be_square() -> None:
    x = torch.arange(24.0).reshape(1, 24, 1)
    got = PixelShuffle((4, 6), 2)(x)
    assert got.tolist() == [
        [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("connector", [PixelShuffleLinear, PixelShuffleMlp])
def test_exports_with_tiles_dynamic(connector: type[nn.Module], tmp_path: Path) -> None:
    contract = connector_contract({"image_embeds": ("tiles", 24, 6)}, ("tiles", 6, 10))
    operators = export(prepare(connector((4, 6), 2, 6, 10), 1), contract, tmp_path)
    assert operators["Transpose"] == 1


def test_refuses_a_grid_that_does_not_fit() -> None:
    with pytest.raises(CheckpointError, match="5 x 4 tokens cannot be cut into squares of 2 x 2"):
        PixelShuffle((5, 4), 2)
    with pytest.raises(InputError, match="15 tokens do not form the grid of 4 x 4"):
        PixelShuffle((4, 4), 2)(torch.zeros(1, 15, 2))
