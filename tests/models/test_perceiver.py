"""Perceiver Resamplers against Idefics' (Flamingo's form) and Idefics2's, with its modality projection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.connectors import CAUGHT, assert_equal, connector_contract, copy_weights, export, prepare
from torch import Tensor
from transformers import Idefics2Config, IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from bridgeport.errors import CheckpointError
from bridgeport.models.perceiver import (
    PerceiverConfig,
    PerceiverConnector,
    PerceiverResampler,
    connector_names,
    idefics_names,
)


def idefics_config(width: int, depth: int, heads: int, head_width: int, latents: int, qk_norm: bool) -> Any:
    return IdeficsConfig(
        vision_config={"embed_dim": width},
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": latents,
            "resampler_depth": depth,
            "resampler_n_heads": heads,
            "resampler_head_dim": head_width,
            "qk_layer_norms_perceiver": qk_norm,
        },
    )


def idefics2_config(encoder_width: int, width: int, depth: int, heads: int, kv_heads: int, head_width: int) -> Any:
    config: Any = Idefics2Config(
        vision_config={"hidden_size": encoder_width, "num_attention_heads": 1},
        text_config={"model_type": "mistral", "hidden_size": width, "intermediate_size": 3 * width},
        perceiver_config={
            "hidden_size": width,
            "rms_norm_eps": 1e-5,
            "resampler_n_latents": 7,
            "resampler_depth": depth,
            "resampler_n_heads": heads,
            "num_key_value_heads": kv_heads,
            "resampler_head_dim": head_width,
        },
    )
    config.perceiver_config._attn_implementation = "eager"
    return config


def context(batch: int, tokens: int, width: int) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize(
    ("width", "depth", "heads", "head_width", "latents", "qk_norm"),
    [(32, 2, 4, 8, 6, False), (20, 1, 3, 10, 1, True), (24, 3, 2, 24, 17, True)],
)
@torch.no_grad()
def test_flamingos_form_equals_idefics(
    width: int, depth: int, heads: int, head_width: int, latents: int, qk_norm: bool
) -> None:
    config = idefics_config(width, depth, heads, head_width, latents, qk_norm)
    make: Any = IdeficsPerceiverResampler
    theirs = prepare(make(config, width, depth, heads, head_width, latents), width)
    form = PerceiverConfig.from_idefics(config)
    ours = PerceiverResampler(form)
    copy_weights(theirs, ours, idefics_names(form))
    x = context(3, 11, width)
    want = theirs(x)
    assert_equal(ours(x), want)
    ours.latents.copy_(ours.latents.roll(1, dims=1))
    assert (ours(x) - want).abs().max() > CAUGHT


@pytest.mark.parametrize(
    ("encoder_width", "width", "depth", "heads", "kv_heads", "head_width"),
    [(20, 32, 3, 4, 2, 12), (24, 24, 1, 3, 1, 8), (9, 16, 2, 4, 4, 6)],
)
@torch.no_grad()
def test_connector_equals_idefics2(
    encoder_width: int, width: int, depth: int, heads: int, kv_heads: int, head_width: int
) -> None:
    config = idefics2_config(encoder_width, width, depth, heads, kv_heads, head_width)
    make: Any = Idefics2Connector
    theirs = prepare(make(config), width)
    form = PerceiverConfig.from_idefics2(config.perceiver_config)
    ours = PerceiverConnector(form, encoder_width=encoder_width, intermediate_width=3 * width, activation="silu")
    copy_weights(theirs, ours, connector_names(form))
    x, mask = context(3, 10, encoder_width), torch.ones(3, 10, dtype=torch.bool)
    mask[1, 6:] = False
    want = theirs(x, mask)
    assert_equal(ours(x, mask.long()), want)
    assert (ours(x, torch.ones_like(mask).long()) - want)[1].abs().max() > CAUGHT
    swapped = PerceiverConfig(**{**form.__dict__, "eps": 1e-2})
    other = PerceiverConnector(swapped, encoder_width=encoder_width, intermediate_width=3 * width, activation="silu")
    other.load_state_dict(ours.state_dict())
    assert (other(x, mask.long()) - want).abs().max() > CAUGHT


@pytest.mark.slow
def test_connector_exports_with_batch_and_tokens_dynamic(tmp_path: Path) -> None:
    form = PerceiverConfig.from_idefics2(idefics2_config(20, 24, 2, 4, 2, 6).perceiver_config)
    connector = prepare(PerceiverConnector(form, encoder_width=20, intermediate_width=32, activation="silu"), 1)
    contract = connector_contract(
        {"image_embeds": ("batch", "tokens", 20), "image_attention_mask": ("batch", "tokens")},
        ("batch", 7, 24),
        masks=("image_attention_mask",),
    )
    export(connector, contract, tmp_path)


def test_resampler_exports_with_batch_and_tokens_dynamic(tmp_path: Path) -> None:
    resampler = PerceiverResampler(PerceiverConfig.from_idefics(idefics_config(24, 2, 3, 8, 5, True)))
    contract = connector_contract({"image_embeds": ("batch", "tokens", 24)}, ("batch", 5, 24))
    operators = export(prepare(resampler, 2), contract, tmp_path)
    assert operators["LayerNormalization"] == 2 * 5 + 1


def test_refuses_heads_that_do_not_share_evenly() -> None:
    config = Idefics2PerceiverConfig(resampler_n_heads=5, num_key_value_heads=2)
    with pytest.raises(CheckpointError, match="5 heads cannot share 2 key/value heads evenly"):
        PerceiverConfig.from_idefics2(config)
