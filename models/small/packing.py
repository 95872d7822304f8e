"""Several sentences after one context, in one row, each as if it stood there alone.

The context (facts in words, or image tokens) is most of what a short sentence costs: sharing it more than
doubles the sentences per second. A sentence sees the context and itself, and its positions go on from the
context's end, so what is learned is exactly what inference asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import additive_mask
from .data import pad
from .text import Sentence


@dataclass(frozen=True)
class Packed:
    """B rows of a context of C tokens and T tokens of sentences.

    ``ids``, ``labels`` int64 ``[B, T]`` (without the context), ``positions`` int64 ``[B, C + T]``,
    ``mask`` additive float ``[B, 1, C + T, C + T]``.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    mask: Tensor


def pack(rows: Sequence[Sequence[Sentence]], context: int) -> Packed:
    """Put each row's sentences after a context of ``context`` tokens."""
    ids = pad([[token for sentence, _ in row for token in sentence] for row in rows])
    labels = pad([[label for _, part in row for label in part] for row in rows], -100)
    segments = pad([[n for n, (part, _) in enumerate(row, start=1) for _ in part] for row in rows], -1)
    offsets = pad([[i for part, _ in row for i in range(len(part))] for row in rows])
    segments = torch.cat([segments.new_zeros(len(rows), context), segments], dim=1)
    positions = torch.cat([torch.arange(context).expand(len(rows), -1), context + offsets], dim=1)
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    return Packed(ids, labels, positions, additive_mask(same & same.new_ones(same.shape[1:]).tril(), torch.float32))
