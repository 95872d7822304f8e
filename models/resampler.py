"""Qwen-VL's resampler: learned queries on a grid read the encoder's tokens once, both with 2-D sine positions.

Bai et al. 2023, "Qwen-VL" (arXiv 2308.12966), section 2.1: one cross-attention layer compresses a picture to 256
tokens. The names are those of the project's checkpoints (`visual.attn_pool`, `visual.ln_post`, `visual.proj`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError

EPS = 1e-6


class Attention(nn.Module):
    """Multi-head attention whose keys and values are projected from different tensors."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (width // num_heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`queries` `[1, Q, D]`, `keys` and `values` `[B, N, D]` to `[B, Q, D]`."""
        query, key, value = (
            self._split(self.query(queries)),
            self._split(self.key(keys)),
            self._split(self.value(values)),
        )
        weights = (query @ key.transpose(-1, -2) * self.scale).softmax(dim=-1)
        attended: Tensor = self.output((weights @ value).transpose(1, 2).flatten(2))
        return attended

    def _split(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, heads, N, D / heads]`."""
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class PackedAttention(nn.Module):
    """The weights of an `Attention` as `torch.nn.MultiheadAttention` stores them, and under its names."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise CheckpointError(f"attention of width {width} cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width).normal_(std=width**-0.5))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def unpack(self) -> Attention:
        """The same attention with a weight for each projection; the three are views of the packed one."""
        state = {f"output.{part}": tensor for part, tensor in self.out_proj.state_dict().items()}
        pieces = zip(self.in_proj_weight.detach().chunk(3), self.in_proj_bias.detach().chunk(3), strict=True)
        for name, (weight, bias) in zip(("query", "key", "value"), pieces, strict=True):
            state |= {f"{name}.weight": weight, f"{name}.bias": bias}
        with torch.device("meta"):
            attention = Attention(self.out_proj.in_features, self.num_heads)
        attention.load_state_dict(state, assign=True)
        return attention

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As `Attention`."""
        attended: Tensor = self.unpack()(queries, keys, values)
        return attended


class Resampler(nn.Module):
    """`side * side` queries of `width` read tokens of `encoder_width`.

    Tokens that form another square than the queries get the queries' positions, interpolated.
    """

    def __init__(self, side: int, width: int, num_heads: int, encoder_width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(side * side, width).normal_(std=0.02))
        self.pos_embed = nn.Parameter(sine_positions(side, width), requires_grad=False)
        # The project leaves the projection out where the widths are equal.
        self.kv_proj = nn.Identity() if encoder_width == width else nn.Linear(encoder_width, width, bias=False)
        self.ln_q = nn.LayerNorm(width, eps=EPS)
        self.ln_kv = nn.LayerNorm(width, eps=EPS)
        self.attn: nn.Module = PackedAttention(width, num_heads)
        # Filled by `fold_constants`.
        self.key_positions: Tensor | None
        self.placed_queries: Tensor | None
        self.register_buffer("key_positions", None, persistent=False)
        self.register_buffer("placed_queries", None, persistent=False)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]`, `N` a square, to `[B, Q, D]`; `Q` is `side * side`, or what was kept of it."""
        values = self.ln_kv(self.kv_proj(image_embeds))
        positions = self.key_positions
        keys = values + (resize_positions(self.pos_embed, values.shape[1]) if positions is None else positions)
        queries = self.queries() if self.placed_queries is None else self.placed_queries
        resampled: Tensor = self.attn(queries[None], keys, values)
        return resampled

    def queries(self) -> Tensor:
        """The learned queries with their positions, `[Q, D]`."""
        placed: Tensor = self.ln_q(self.query) + self.pos_embed[: len(self.query)]
        return placed

    def keep_queries(self, count: int) -> None:
        """From now on, compute the first `count` learned queries alone."""
        self.query = nn.Parameter(self.query[:count].detach().clone())
        if self.placed_queries is not None:
            self.placed_queries = self.placed_queries[:count].clone()


class ResamplerConnector(nn.Module):
    """All of Qwen-VL's connector: the resampler, a LayerNorm and a square matrix (`x @ proj`)."""

    def __init__(self, side: int, width: int, num_heads: int, encoder_width: int) -> None:
        super().__init__()
        self.attn_pool = Resampler(side, width, num_heads, encoder_width)
        self.ln_post = nn.LayerNorm(width, eps=EPS)
        self.proj = nn.Parameter(torch.empty(width, width).normal_(std=width**-0.5))

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` to `image_features` `[B, side * side, D]`."""
        features: Tensor = self.ln_post(self.attn_pool(image_embeds)) @ self.proj
        return features


def unpack_projections(connector: nn.Module) -> None:
    """To be called once the weights are in: every projection then exports as one stored matrix, not as a slice."""
    for module in connector.modules():
        if isinstance(module, Resampler) and isinstance(module.attn, PackedAttention):
            module.attn = module.attn.unpack().eval().requires_grad_(False)


def fold_constants(connector: nn.Module, num_tokens: int) -> None:
    """To be called once the weights are in: what no picture changes is then stored, and no graph computes it.

    That is the queries with their positions, and the positions of `num_tokens` keys.
    """
    for module in connector.modules():
        if isinstance(module, Resampler):
            module.key_positions = resize_positions(module.pos_embed.detach(), num_tokens).contiguous()
            module.placed_queries = module.queries().detach()


def sine_positions(side: int, width: int) -> Tensor:
    """`[side * side, width]`: the first half of the channels tells the column, the second the row.

    Each half is the sines, then the cosines, of the place times 10000^(-i / n) (Vaswani et al. 2017, section 3.5).
    """
    if width % 4:
        raise CheckpointError(f"2-D sine positions need a width that is a multiple of 4, not {width}")
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def resize_positions(positions: Tensor, num_tokens: int) -> Tensor:
    """Positions of one square grid for another: bicubic, `[S^2, D]` to `[num_tokens, D]`."""
    old, new = math.isqrt(positions.shape[0]), math.isqrt(num_tokens)
    if new * new != num_tokens:
        raise CheckpointError(f"{num_tokens} tokens do not form a square, which the resampler's positions need")
    if new == old:
        return positions
    picture = positions.t().reshape(1, -1, old, old)
    return F.interpolate(picture, size=(new, new), mode="bicubic").flatten(2)[0].t()
