"""A Q-Former of one layer: learned queries read the encoder's tokens once, and no more.

Q-Former (Li et al. 2023, "BLIP-2", arXiv 2301.12597) without self-attention, text and depth: cross-attention and a GELU
feed-forward of four times the width, each with its residual and then LayerNorm. The smallest connector that turns any
number of tokens into a fixed one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import CrossAttention


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
