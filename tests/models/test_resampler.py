"""Qwen-VL's resampler against a composition of torch's modules, under the names of the original checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.connectors import CAUGHT, assert_equal, connector_contract, copy_weights, export, prepare, weights_of
from torch import Tensor, nn

from bridgeport.errors import CheckpointError
from bridgeport.models.resampler import ResamplerConnector, resize_positions, sine_positions, unpack_projections

# side of the queries, side of the tokens, width, heads, encoder's width
SHAPES = [(3, 3, 32, 4, 20), (2, 5, 24, 3, 24), (4, 8, 16, 1, 40), (4, 3, 40, 5, 12)]


class Reference(nn.Module):
    """The connector written with torch's MultiheadAttention; its `state_dict` has the original names."""

    def __init__(self, side: int, width: int, heads: int, encoder_width: int) -> None:
        super().__init__()
        pool: Any = nn.Module()
        pool.query = nn.Parameter(torch.zeros(side * side, width))
        pool.pos_embed = nn.Parameter(torch.zeros(side * side, width))
        pool.kv_proj = nn.Identity() if encoder_width == width else nn.Linear(encoder_width, width, bias=False)
        pool.attn = nn.MultiheadAttention(width, heads)
        pool.ln_q, pool.ln_kv = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn_pool: Any = pool
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        pool, batch, count = self.attn_pool, tokens.shape[0], tokens.shape[1]
        old, new = math.isqrt(len(pool.pos_embed)), math.isqrt(count)
        positions = pool.pos_embed
        if old != new:
            grid = positions.reshape(1, old, old, -1).permute(0, 3, 1, 2)
            grid = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
            positions = grid.permute(0, 2, 3, 1).flatten(0, 2)
        values = pool.ln_kv(pool.kv_proj(tokens)).permute(1, 0, 2)
        queries = pool.ln_q(pool.query)[:, None].repeat(1, batch, 1) + pool.pos_embed[:, None]
        out = pool.attn(queries, values + positions[:, None], values, need_weights=False)[0].permute(1, 0, 2)
        features: Tensor = self.ln_post(out) @ self.proj
        return features


@pytest.mark.parametrize(("side", "token_side", "width", "heads", "encoder_width"), SHAPES)
@torch.no_grad()
def test_equals_torch_modules(side: int, token_side: int, width: int, heads: int, encoder_width: int) -> None:
    theirs = prepare(Reference(side, width, heads, encoder_width), width)
    ours = ResamplerConnector(side, width, heads, encoder_width)
    copy_weights(theirs, ours)
    x = torch.randn(3, token_side**2, encoder_width, generator=torch.Generator().manual_seed(1))
    want = theirs(x)
    assert_equal(ours(x), want)
    if token_side > 1:
        turned = x.reshape(3, token_side, token_side, -1).transpose(1, 2).flatten(1, 2)
        assert (ours(turned) - want).abs().max() > CAUGHT
    unpack_projections(ours)
    assert_equal(ours(x), want)


def test_unpacking_copies_no_weight() -> None:
    ours = ResamplerConnector(2, 16, 2, 12)
    packed = ours.attn_pool.attn.get_parameter("in_proj_weight")
    unpack_projections(ours)
    key = ours.attn_pool.attn.get_parameter("key.weight")
    assert key.data_ptr() == packed.data_ptr() + 16 * 16 * 4
    assert torch.equal(key, packed[16:32])


def test_sine_positions_are_those_of_the_project() -> None:
    # Worked out by hand: width 8 is two frequencies, 1 and 1/100, for each of column and row.
    positions = sine_positions(3, 8).numpy()
    for row in range(3):
        for column in range(3):
            want = [
                *(math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100)),
                *(math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)),
            ]
            # FP32 keeps 1e-7 of values up to 1.
            np.testing.assert_allclose(positions[3 * row + column], want, rtol=1e-6, atol=1e-7)


def test_exports_with_a_weight_for_each_projection(tmp_path: Path) -> None:
    ours = ResamplerConnector(3, 16, 2, 12)
    prepare(ours, 1)
    unpack_projections(ours)
    contract = connector_contract({"image_embeds": ("batch", 25, 12)}, ("batch", 9, 16))
    export(ours, contract, tmp_path)
    stored = weights_of(tmp_path / "connector.onnx")
    names = [f"attn_pool.attn.{name}.weight.transposed" for name in ("query", "key", "value", "output")]
    assert [stored.get(name) for name in names] == [(16, 16)] * 4


@pytest.mark.slow
def test_exports_without_projection_and_interpolation(tmp_path: Path) -> None:
    ours = prepare(ResamplerConnector(3, 16, 2, 16), 1)
    export(ours, connector_contract({"image_embeds": ("batch", 9, 16)}, ("batch", 9, 16)), tmp_path)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(CheckpointError, match="a multiple of 4, not 18"):
        sine_positions(2, 18)
    with pytest.raises(CheckpointError, match="width 16 cannot be split into 3 heads"):
        ResamplerConnector(2, 16, 3, 8)
    with pytest.raises(CheckpointError, match="7 tokens do not form a square"):
        resize_positions(sine_positions(2, 8), 7)
