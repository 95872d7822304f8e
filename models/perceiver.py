"""Perceiver Resampler: learned latents read a picture's tokens, and each other, in a few layers.

Jaegle et al. 2021, "Perceiver" (arXiv 2103.03206); Alayrac et al. 2022, "Flamingo" (arXiv 2204.14198), section 2.1.
Two forms of it are in use: Flamingo's, which Idefics took over (LayerNorm, ReLU), and Idefics2's (Laurençon et al.
2024, arXiv 2405.02246: RMSNorm, grouped-query attention, gated SiLU, a mask for padding).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .activations import find_activation
from .attention import additive_mask


@dataclass(frozen=True, kw_only=True)
class PerceiverConfig:
    """Sizes and form of a Perceiver Resampler.

    `norm`: LayerNorm or RMSNorm. `gated`: a gated feed-forward. `qk_norm`: whether queries and keys are normalised
    within each head. No linear layer has a bias.
    """

    num_latents: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    intermediate_width: int
    norm: Literal["layer", "rms"]
    eps: float
    activation: str
    gated: bool
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"perceiver config: {self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly"
            )

    @classmethod
    def from_idefics(cls, config: Any) -> PerceiverConfig:
        """Of transformers' `IdeficsConfig`, which is Flamingo's form."""
        perceiver, vision = config.perceiver_config, config.vision_config
        return cls(
            num_latents=perceiver.resampler_n_latents,
            width=vision.embed_dim,
            depth=perceiver.resampler_depth,
            num_heads=perceiver.resampler_n_heads,
            num_kv_heads=perceiver.resampler_n_heads,
            head_width=perceiver.resampler_head_dim,
            intermediate_width=4 * vision.embed_dim,
            norm="layer",
            eps=1e-5,
            activation="relu",
            gated=False,
            qk_norm=perceiver.qk_layer_norms_perceiver,
        )

    @classmethod
    def from_idefics2(cls, perceiver: Any) -> PerceiverConfig:
        """Of transformers' `Idefics2PerceiverConfig`."""
        return cls(
            num_latents=perceiver.resampler_n_latents,
            width=perceiver.hidden_size,
            depth=perceiver.resampler_depth,
            num_heads=perceiver.resampler_n_heads,
            num_kv_heads=perceiver.num_key_value_heads,
            head_width=perceiver.resampler_head_dim,
            intermediate_width=4 * perceiver.hidden_size,
            norm="rms",
            eps=perceiver.rms_norm_eps,
            activation=perceiver.hidden_act,
            gated=True,
        )

    def make_norm(self, width: int) -> nn.Module:
        """A norm over `width` channels."""
        return nn.LayerNorm(width, eps=self.eps) if self.norm == "layer" else nn.RMSNorm(width, eps=self.eps)


class PerceiverAttention(nn.Module):
    """The latents attend to tokens and latents, which stand in one row: cross- and self-attention in one."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.scale = config.head_width**-0.5
        self.latents_norm = config.make_norm(config.width)
        self.context_norm = config.make_norm(config.width)
        self.query = nn.Linear(config.width, config.num_heads * config.head_width, bias=False)
        self.key = nn.Linear(config.width, config.num_kv_heads * config.head_width, bias=False)
        self.value = nn.Linear(config.width, config.num_kv_heads * config.head_width, bias=False)
        self.output = nn.Linear(config.num_heads * config.head_width, config.width, bias=False)
        self.query_norm = config.make_norm(config.head_width) if config.qk_norm else nn.Identity()
        self.key_norm = config.make_norm(config.head_width) if config.qk_norm else nn.Identity()

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """`latents` `[B, Q, D]`, `context` `[B, N, D]`, `mask` `[B, 1, 1, N + Q]` to add, to `[B, Q, D]`."""
        latents = self.latents_norm(latents)
        read = torch.cat([self.context_norm(context), latents], dim=1)
        queries = self.query_norm(self._split(self.query(latents), self.num_heads))
        keys = self._share(self.key_norm(self._split(self.key(read), self.num_kv_heads)))
        values = self._share(self._split(self.value(read), self.num_kv_heads))
        scores = queries @ keys.transpose(-1, -2) * self.scale
        if mask is not None:
            scores = scores + mask
        attended: Tensor = self.output((scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2))
        return attended

    @staticmethod
    def _split(x: Tensor, heads: int) -> Tensor:
        """`[B, N, heads * size]` to `[B, heads, N, size]`."""
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

    def _share(self, x: Tensor) -> Tensor:
        """Grouped-query attention: each key/value head stands for several heads, `[B, heads, N, size]`."""
        groups = self.num_heads // self.num_kv_heads
        return x if groups == 1 else x.repeat_interleave(groups, dim=1)


_GATED = ("gate", "up", "down")


class GatedMlp(nn.Module):
    """`down(act(gate(x)) * up(x))` without biases (Shazeer 2020, "GLU Variants Improve Transformer", 2002.05202)."""

    def __init__(self, width: int, intermediate_width: int, output_width: int, activation: str) -> None:
        super().__init__()
        self.activation = find_activation(activation)
        self.gate = nn.Linear(width, intermediate_width, bias=False)
        self.up = nn.Linear(width, intermediate_width, bias=False)
        self.down = nn.Linear(intermediate_width, output_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, width]` to `[B, N, output_width]`."""
        out: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return out


class PlainMlp(nn.Module):
    """`down(act(up(x)))` without biases."""

    def __init__(self, width: int, intermediate_width: int, activation: str) -> None:
        super().__init__()
        self.activation = find_activation(activation)
        self.up = nn.Linear(width, intermediate_width, bias=False)
        self.down = nn.Linear(intermediate_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, width]` to `[B, N, width]`."""
        out: Tensor = self.down(self.activation(self.up(x)))
        return out


class PerceiverLayer(nn.Module):
    """Attention and feed-forward, each behind its norm and with its residual."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.attention = PerceiverAttention(config)
        self.mlp_norm = config.make_norm(config.width)
        width, intermediate, activation = config.width, config.intermediate_width, config.activation
        self.mlp: nn.Module = (
            GatedMlp(width, intermediate, width, activation)
            if config.gated
            else PlainMlp(width, intermediate, activation)
        )

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """`latents` `[B, Q, D]` after reading `context` `[B, N, D]`."""
        latents = latents + self.attention(latents, context, mask)
        out: Tensor = latents + self.mlp(self.mlp_norm(latents))
        return out


class PerceiverResampler(nn.Module):
    """Any number of tokens to `num_latents`."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.width).normal_())
        self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.depth))
        self.norm = config.make_norm(config.width)

    def forward(self, image_embeds: Tensor, image_attention_mask: Tensor | None = None) -> Tensor:
        """`image_embeds` `[B, N, D]` to `[B, Q, D]`.

        `image_attention_mask` `[B, N]`: True or 1 where there is picture, 0 where there is padding.
        """
        latents = self.latents.expand(image_embeds.shape[0], -1, -1)
        mask = None
        if image_attention_mask is not None:
            keep = F.pad(image_attention_mask.to(image_embeds.dtype), (0, self.config.num_latents), value=1.0)
            mask = additive_mask(keep, image_embeds.dtype)
        for layer in self.layers:
            latents = layer(latents, image_embeds, mask)
        normed: Tensor = self.norm(latents)
        return normed

    def keep_queries(self, count: int) -> None:
        """From now on, compute the first `count` latents alone."""
        self.latents = nn.Parameter(self.latents[:count].detach().clone())
        self.config = replace(self.config, num_latents=count)


class PerceiverConnector(nn.Module):
    """Idefics2's connector: a gated MLP into the language model's width (modality projection), then the resampler."""

    def __init__(
        self, config: PerceiverConfig, *, encoder_width: int, intermediate_width: int, activation: str
    ) -> None:
        super().__init__()
        self.projection = GatedMlp(encoder_width, intermediate_width, config.width, activation)
        self.resampler = PerceiverResampler(config)

    def forward(self, image_embeds: Tensor, image_attention_mask: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]`, `image_attention_mask` `[B, N]` (1: picture) to `image_features` `[B, Q, D]`."""
        features: Tensor = self.resampler(self.projection(image_embeds), image_attention_mask)
        return features


def idefics_names(config: PerceiverConfig) -> dict[str, str]:
    """`PerceiverResampler`'s names to those of transformers' `IdeficsPerceiverResampler`."""
    parts = {
        "attention.latents_norm": "0.latents_layer_norm",
        "attention.context_norm": "0.context_layer_norm",
        "attention.query": "0.q_proj",
        "attention.key": "0.k_proj",
        "attention.value": "0.v_proj",
        "attention.output": "0.output_proj",
        "attention.query_norm": "0.q_layer_norm",
        "attention.key_norm": "0.k_layer_norm",
        "mlp_norm": "1.ln",
        "mlp.up": "1.fc",
        "mlp.down": "1.c_proj",
    }
    return _names(config, "blocks", parts, "layer_norm")


def idefics2_names(config: PerceiverConfig) -> dict[str, str]:
    """`PerceiverResampler`'s names to those of transformers' `Idefics2PerceiverResampler`."""
    parts = {
        "attention.latents_norm": "input_latents_norm",
        "attention.context_norm": "input_context_norm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    return _names(config, "layers", parts, "norm")


def connector_names(config: PerceiverConfig) -> dict[str, str]:
    """`PerceiverConnector`'s names to those of transformers' `Idefics2Connector`."""
    projection = {f"projection.{name}.weight": f"modality_projection.{name}_proj.weight" for name in _GATED}
    resampler = {f"resampler.{a}": f"perceiver_resampler.{b}" for a, b in idefics2_names(config).items()}
    return projection | resampler


def _names(config: PerceiverConfig, layers: str, parts: dict[str, str], norm: str) -> dict[str, str]:
    modules = {
        f"layers.{i}.{ours}": f"{layers}.{i}.{theirs}" for i in range(config.depth) for ours, theirs in parts.items()
    }
    names = {"latents": "latents", "norm.weight": f"{norm}.weight", "norm.bias": f"{norm}.bias"}
    for ours, theirs in modules.items():
        names |= {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}
    with torch.device("meta"):
        present = PerceiverResampler(config).state_dict()
    return {ours: theirs for ours, theirs in names.items() if ours in present}
