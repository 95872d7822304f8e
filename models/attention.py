"""Multi-head cross-attention: queries of one width read keys and values of another.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762); in the form that BLIP-2's Q-Former uses
(Li et al. 2023, arXiv 2301.12597): biased projections, scores divided by the square root of the head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError

# A masked score gets this added. Finite, so that a row with every key masked is uniform and not NaN, and
# inside FP16's range (65504), so that a graph cast to FP16 does not overflow; exp(-1e4) is exactly 0 in both.
MASKED = -1.0e4


def additive_mask(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores to add for a mask of which keys to keep.

    ``keep``: bool or 0/1, ``[B, K]`` (the same for every query) or ``[B, Q, K]``. Returns ``[B, 1, 1|Q, K]``
    in ``dtype``: 0 where kept, :data:`MASKED` where not.
    """
    if keep.dim() == 2:
        keep = keep[:, None, :]
    if keep.dim() != 3:
        raise InputError(f"attention mask has {keep.dim()} axes; give [B, K] or [B, Q, K]")
    return (1.0 - keep[:, None].to(dtype)) * MASKED


class CrossAttention(nn.Module):
    """Multi-head attention whose keys and values may have another width than the queries.

    Self-attention is the case ``forward(x, x)`` with equal widths. Attention is computed eagerly (no fused
    kernel), so that it traces to MatMul, Mul, Softmax, MatMul, which every ONNX engine knows how to fuse.

    ``query_width``: width of the queries and of the output. ``key_value_width``: width of what is read.
    """

    def __init__(self, query_width: int, key_value_width: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or query_width % num_heads:
            raise InputError(f"attention of width {query_width} cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.head_width = query_width // num_heads
        self.scale = self.head_width**-0.5
        self.query = nn.Linear(query_width, query_width)
        self.key = nn.Linear(key_value_width, query_width)
        self.value = nn.Linear(key_value_width, query_width)
        self.output = nn.Linear(query_width, query_width)

    def forward(
        self, queries: Tensor, key_values: Tensor, mask: Tensor | None = None, *, with_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``queries`` ``[B, Q, Dq]`` over ``key_values`` ``[B, K, Dkv]``.

        ``mask``: which keys may be seen, bool or 0/1, ``[B, K]`` (key padding) or ``[B, Q, K]``; or, where
        several layers share one, the float ``[B, 1, 1|Q, K]`` that :func:`additive_mask` made of it.
        Returns the output ``[B, Q, Dq]`` and, if asked for, the weights ``[B, heads, Q, K]`` (rows sum to 1).
        """
        scores = self._split(self.query(queries)) @ self._split(self.key(key_values)).transpose(-1, -2)
        scores = scores * self.scale
        if mask is not None:
            scores = scores + (mask if mask.dim() == 4 else additive_mask(mask, scores.dtype))
        weights = scores.softmax(dim=-1)
        context = weights @ self._split(self.value(key_values))
        attended = self.output(context.transpose(1, 2).flatten(2))
        return attended, weights if with_weights else None

    def _split(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, heads, N, D / heads]``."""
        return x.reshape(*x.shape[:2], self.num_heads, self.head_width).transpose(1, 2)
