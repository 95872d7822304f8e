"""CrossAttention against torch's own MultiheadAttention, its masks, and its refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bridgeport.errors import InputError
from bridgeport.models.attention import MASKED, CrossAttention, additive_mask


def reference(ours: CrossAttention, width: int, key_value_width: int) -> nn.MultiheadAttention:
    """torch's MultiheadAttention with our weights: an independent second implementation."""
    theirs = nn.MultiheadAttention(width, ours.num_heads, kdim=key_value_width, vdim=key_value_width, batch_first=True)
    with torch.no_grad():
        weights = (ours.query.weight, ours.key.weight, ours.value.weight)
        if theirs.in_proj_weight is not None:
            theirs.in_proj_weight.copy_(torch.cat(weights))
        else:
            for name, weight in zip("qkv", weights, strict=True):
                getattr(theirs, f"{name}_proj_weight").copy_(weight)
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    return theirs.eval()


@pytest.mark.parametrize(("width", "key_value_width", "heads"), [(32, 32, 4), (48, 80, 3), (16, 8, 1), (64, 20, 8)])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_equals_multihead_attention(width: int, key_value_width: int, heads: int, padded: bool) -> None:
    torch.manual_seed(width)
    ours = CrossAttention(width, key_value_width, heads)
    queries, read = torch.randn(3, 5, width), torch.randn(3, 11, key_value_width)
    keep = torch.ones(3, 11, dtype=torch.bool)
    keep[1, 7:] = False
    mask = keep if padded else None
    got, weights = ours(queries, read, mask, with_weights=True)
    want, want_weights = reference(ours, width, key_value_width)(
        queries, read, read, key_padding_mask=~keep if padded else None, average_attn_weights=False
    )
    assert weights is not None
    # One FP32 matmul of these widths rounds at about 1e-6; a missing scale or mask is off by more than 1e-2.
    torch.testing.assert_close(got, want, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(weights, want_weights, atol=5e-6, rtol=1e-5)
    if padded:
        assert weights[1, :, :, 7:].abs().max() == 0
        unmasked, _ = ours(queries, read)
        assert (unmasked[1] - want[1]).abs().max() > 1e-3, "a forgotten mask would not be caught"


def test_weights_only_when_asked() -> None:
    _, weights = CrossAttention(8, 8, 2)(torch.randn(1, 2, 8), torch.randn(1, 3, 8))
    assert weights is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fully_masked_row_is_finite(dtype: torch.dtype) -> None:
    attention = CrossAttention(8, 8, 2).to(dtype)
    queries, read, nothing = torch.randn(1, 2, 8), torch.randn(1, 3, 8), torch.zeros(1, 3, dtype=torch.bool)
    out, weights = attention(queries.to(dtype), read.to(dtype), nothing, with_weights=True)
    assert weights is not None
    assert torch.isfinite(out).all()
    assert weights.sum(-1).allclose(torch.ones(1, dtype=dtype), atol=2e-3)


def test_additive_mask_fits_fp16() -> None:
    keep = torch.tensor([[True, False]])
    assert torch.finfo(torch.float16).min < MASKED
    expected: Tensor = torch.tensor([[[[0.0, MASKED]]]], dtype=torch.float16)
    assert torch.equal(additive_mask(keep, torch.float16), expected)
    assert additive_mask(keep[:, None].expand(1, 4, 2), torch.float32).shape == (1, 1, 4, 2)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="width 10 cannot be split into 4 heads"):
        CrossAttention(10, 8, 4)
    with pytest.raises(InputError, match="1 axes"):
        additive_mask(torch.ones(3), torch.float32)
