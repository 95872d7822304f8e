"""The first Qwen-VL (Bai et al. 2023, arXiv 2308.12966): a ViT, one cross-attention of 256 queries, a Qwen decoder.

transformers has no class for it; how its checkpoints are read is in `qwen_vl`. The encoder is made of
transformers' CLIP layers, the language model is transformers' Qwen2.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from .contract import StageContract
from .language import (
    batch_axis,
    check_image_token,
    float_spec,
    kv_cache,
    language_contracts,
    language_stages,
)
from .resampler import ResamplerConnector, fold_constants, resize_positions, unpack_projections
from .stages import Layout, Stage

LANGUAGE_MODEL = {"model": "language_model.model.", "lm_head": "language_model.lm_head."}
# The grid that the encoder's positions are trained for, whatever the picture's.
POSITIONS = 16 * 16
_HEAD = 128


class QwenVlConfig(LlavaConfig):  # type: ignore[no-untyped-call]
    """A config.json of Qwen-VL as `qwen_vl` converts it: LLaVA's parts, with another connector."""

    model_type = "qwen"

    @property
    def num_query_tokens(self) -> int:
        """Features of a picture."""
        return int(self.image_seq_length)


class QwenVisionEncoder(nn.Module):
    """OpenCLIP's ViT-bigG without class token and final norm; positions of another grid are resized (bicubic)."""

    def __init__(self, vision_config: Any) -> None:
        super().__init__()
        config = copy.deepcopy(vision_config)
        config._attn_implementation = "eager"
        width, patch = config.hidden_size, config.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(POSITIONS, width).normal_(std=width**-0.5))
        self.ln_pre = nn.LayerNorm(width, eps=config.layer_norm_eps)
        layers = [CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.layers: Any = nn.ModuleList(layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` `[B, 3, S, S]` to `image_embeds` `[B, N, Dv]`, row by row."""
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        x = self.ln_pre(patches + resize_positions(self.positional_embedding, patches.shape[1]))
        for layer in self.layers:
            x = layer(x, attention_mask=None)
        embeds: Tensor = x
        return embeds


def causal_lm(config: Any) -> Layout:
    """`QWenLMHeadModel` with its vision part, in the stages encoder, connector, embed_tokens and llm."""
    text, vision = config.text_config, config.vision_config
    check_image_token(config, text)
    tokens = (vision.image_size // vision.patch_size) ** 2
    embeds = float_spec("image_embeds", "batch", tokens, vision.hidden_size)
    return Layout(
        kind="qwen-vl",
        stages={
            "encoder": Stage(
                lambda: QwenVisionEncoder(vision),
                lambda name: f"vision_model.{name}",
                finish=lambda module: _resize_once(module, tokens),
            ),
            "connector": Stage(
                lambda: connector(config),
                lambda name: f"connector.{name}",
                finish=lambda module: _finish_connector(module, tokens),
            ),
            **language_stages(text, **LANGUAGE_MODEL),
        },
        contracts={
            "encoder": StageContract(
                name="encoder",
                inputs=(float_spec("pixel_values", "batch", 3, vision.image_size, vision.image_size),),
                outputs=(embeds,),
                axes=(batch_axis(),),
            ),
            "connector": StageContract(
                name="connector",
                inputs=(embeds,),
                outputs=(float_spec("image_features", "batch", config.num_query_tokens, text.hidden_size),),
                axes=(batch_axis(),),
            ),
            **language_contracts(text),
        },
        kv_cache=kv_cache(text),
        text_config=text,
    )


def connector(config: Any) -> ResamplerConnector:
    """The resampler and what follows it."""
    width = config.text_config.hidden_size
    return ResamplerConnector(
        round(config.num_query_tokens**0.5), width, width // _HEAD, config.vision_config.hidden_size
    )


def _resize_once(encoder: nn.Module, tokens: int) -> None:
    """Positions for the picture's grid, so that no graph resizes them."""
    resized = resize_positions(encoder.get_parameter("positional_embedding"), tokens)
    encoder.positional_embedding = nn.Parameter(resized.detach().contiguous(), requires_grad=False)


def _finish_connector(module: nn.Module, tokens: int) -> None:
    unpack_projections(module)
    fold_constants(module, tokens)
