"""The one-layer Q-Former against a composition of torch's own modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models.connectors import CAUGHT, assert_equal, connector_contract, export, prepare
from torch import Tensor, nn

from bridgeport.models.simplified_qformer import SimplifiedQFormer


def reference(ours: SimplifiedQFormer, features: Tensor, *, post_norm: bool = True) -> Tensor:
    """The same by torch's MultiheadAttention and functional layers, from our weights."""
    attention, width = ours.cross_attention, ours.query_tokens.shape[2]
    kv_width = features.shape[2]
    theirs = nn.MultiheadAttention(width, attention.num_heads, kdim=kv_width, vdim=kv_width, batch_first=True)
    weights = (attention.query.weight, attention.key.weight, attention.value.weight)
    with torch.no_grad():
        if theirs.in_proj_weight is not None:
            theirs.in_proj_weight.copy_(torch.cat(weights))
        else:
            for name, weight in zip("qkv", weights, strict=True):
                getattr(theirs, f"{name}_proj_weight").copy_(weight)
        theirs.in_proj_bias.copy_(torch.cat([attention.query.bias, attention.key.bias, attention.value.bias]))
        theirs.out_proj.load_state_dict(attention.output.state_dict())
    queries = ours.query_tokens.repeat(len(features), 1, 1)
    queries = queries + theirs(queries, features, features, need_weights=False)[0]
    queries = ours.cross_norm(queries) if post_norm else queries
    up, down = ours.feed_forward[0], ours.feed_forward[2]
    queries = queries + down(nn.functional.gelu(up(queries)))
    normed: Tensor = ours.feed_forward_norm(queries)
    return normed


@pytest.mark.parametrize(
    ("width", "heads", "queries", "encoder_width", "tokens"),
    [(32, 4, 8, 32, 17), (48, 3, 1, 20, 5), (24, 8, 33, 40, 1)],
)
@torch.no_grad()
def test_equals_torch_modules(width: int, heads: int, queries: int, encoder_width: int, tokens: int) -> None:
    ours = SimplifiedQFormer(width, heads, queries, encoder_width=encoder_width)
    prepare(ours, width)
    x = torch.randn(3, tokens, encoder_width, generator=torch.Generator().manual_seed(1))
    assert_equal(ours(x), reference(ours, x))
    assert (ours(x) - reference(ours, x, post_norm=False)).abs().max() > CAUGHT


@torch.no_grad()
def test_queries_that_are_left_out_are_not_computed() -> None:
    """Queries do not see each other here, so those that are kept give what they gave."""
    ours = SimplifiedQFormer(24, 3, 5, encoder_width=20)
    prepare(ours, 1)
    x = torch.randn(3, 7, 20, generator=torch.Generator().manual_seed(1))
    whole, rows = ours(x), []
    ours.feed_forward.register_forward_hook(lambda _module, inputs, _: rows.append(inputs[0].shape[1]))
    ours.keep_queries(2)
    assert_equal(ours(x), whole[:, :2])
    assert rows == [2]


def test_the_defaults_are_those_of_blip2_base() -> None:
    with torch.device("meta"):
        ours = SimplifiedQFormer()
    assert ours(torch.empty(2, 197, 768, device="meta")).shape == (2, 32, 768)


def test_exports_with_batch_and_tokens_dynamic(tmp_path: Path) -> None:
    ours = prepare(SimplifiedQFormer(24, 3, 5, encoder_width=20), 1)
    contract = connector_contract({"image_embeds": ("batch", "tokens", 20)}, ("batch", 5, 24))
    operators = export(ours, contract, tmp_path)
    assert operators["Softmax"] == 1
    assert operators["LayerNormalization"] == 2
