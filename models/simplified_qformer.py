"""A Q-Former of one layer: learned queries read the encoder's tokens once, and no more.

Q-Former (Li et al. 2023, "BLIP-2", arXiv 2301.12597) without self-attention, text and depth: cross-attention and a GELU
feed-forward of four times the width, each with its residual and then LayerNorm. The smallest connector that turns any
number of tokens into a fixed one.

transformers has no class for it. A checkpoint of LLaVA's or BLIP-2's class has it with these keys in config.json, the
second one where a default is not right, and its tensors under `connector.`:

    "bridgeport_connector": "simplified-qformer",
    "simplified_qformer": {"width": 768, "num_heads": 8, "num_queries": 32}
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .attention import CrossAttention

KEY = "simplified_qformer"


@dataclass(frozen=True)
class SimplifiedQFormerConfig:
    """Sizes of the module; the widths around it follow from the checkpoint's encoder and language model."""

    width: int = 768
    num_heads: int = 8
    num_queries: int = 32

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{KEY}: {name} is {value!r}; accepted is a whole number from 1")

    @classmethod
    def read(cls, config: Any) -> SimplifiedQFormerConfig:
        """What a checkpoint's config says. Raises InputError for a name that is not known, or no size."""
        given = getattr(config, KEY, None)
        given = {} if given is None else given
        known = [field.name for field in fields(cls)]
        if not isinstance(given, dict) or not given.keys() <= set(known):
            raise InputError(f"{KEY} is {given!r}; accepted is an object of {', '.join(known)}")
        return cls(**given)


class SimplifiedQFormer(nn.Module):
    """`num_queries` learned queries of `width` cross-attend to tokens of `encoder_width` (default: `width`)."""

    def __init__(
        self, width: int = 768, num_heads: int = 8, num_queries: int = 32, *, encoder_width: int | None = None
    ) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, width).normal_(std=0.02))
        self.cross_attention = CrossAttention(width, encoder_width or width, num_heads)
        self.cross_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` to `[B, Q, D]`."""
        queries = self.query_tokens.expand(image_embeds.shape[0], -1, -1)
        attended, _ = self.cross_attention(queries, image_embeds)
        queries = self.cross_norm(queries + attended)
        out: Tensor = self.feed_forward_norm(queries + self.feed_forward(queries))
        return out

    def keep_queries(self, count: int) -> None:
        """From now on, compute the first `count` learned queries alone."""
        self.query_tokens = nn.Parameter(self.query_tokens[:, :count].detach().clone())


class SimplifiedQFormerConnector(nn.Module):
    """The one-layer Q-Former and a linear projection to the language model's width, as a checkpoint's connector."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        sizes, encoder_width = SimplifiedQFormerConfig.read(config), config.vision_config.hidden_size
        self.qformer = SimplifiedQFormer(
            sizes.width, sizes.num_heads, sizes.num_queries, encoder_width=encoder_width * _layers_read(config)
        )
        self.projection = nn.Linear(sizes.width, config.text_config.hidden_size)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` to `[B, Q, D]`, `D` the language model's width."""
        out: Tensor = self.projection(self.qformer(image_embeds))
        return out


def num_queries(config: Any) -> int:
    """Tokens for a picture."""
    return SimplifiedQFormerConfig.read(config).num_queries


def _layers_read(config: Any) -> int:
    """LLaVA's encoder gives the features of several layers side by side where a list of them is selected."""
    layers = getattr(config, "vision_feature_layer", None)
    return len(layers) if isinstance(layers, (list, tuple)) else 1
