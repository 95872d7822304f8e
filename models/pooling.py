"""Spatial pooling: fewer tokens for each frame of a video, by shrinking the grid that they form.

Zhang et al. 2024, "LLaVA-NeXT: A Strong Zero-shot Video Understanding Model" pools windows of 2 x 2 patches; Li et al.
2024, "LLaVA-OneVision" (arXiv 2408.03326) interpolates to half the side.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, InputError

POOLING_MODES = ("average", "max", "conv")

Grid = tuple[int, int]


class WindowPooling(nn.Module):
    """Average, maximum or a learned convolution over windows of `stride` x `stride` tokens that do not overlap.

    `grid`: rows and columns of tokens; those that fill no whole window at its end are dropped. `width` and
    `output_width` are the convolution's; the other modes keep the width and have no weights.
    """

    def __init__(
        self, grid: Grid, *, mode: str = "average", stride: int = 2, width: int = 0, output_width: int = 0
    ) -> None:
        super().__init__()
        if mode not in POOLING_MODES:
            raise CheckpointError(f"spatial_pool_mode {mode!r} is unknown; known are {', '.join(POOLING_MODES)}")
        if not 1 <= stride <= min(grid):
            raise CheckpointError(f"spatial_pool_stride {stride} does not fit a grid of {grid[0]} x {grid[1]} tokens")
        self.grid = grid
        self.output_grid = (grid[0] // stride, grid[1] // stride)
        self.pool: nn.Module
        if mode == "conv":
            self.pool = nn.Conv2d(width, output_width, kernel_size=stride, stride=stride)
        else:
            self.pool = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}[mode](kernel_size=stride, stride=stride)

    def forward(self, frames: Tensor) -> Tensor:
        """`frames` `[F, rows * columns, D]` to `[F, rows // stride * (columns // stride), D]`."""
        return _to_tokens(self.pool(_to_picture(frames, self.grid)))


class BilinearPooling(nn.Module):
    """Bilinear interpolation to half of `grid`, rounded up; no weights."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.output_grid = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))

    def forward(self, frames: Tensor) -> Tensor:
        """`frames` `[F, rows * columns, D]` to `[F, ceil(rows / 2) * ceil(columns / 2), D]`."""
        return _to_tokens(F.interpolate(_to_picture(frames, self.grid), size=self.output_grid, mode="bilinear"))


def _to_picture(tokens: Tensor, grid: Grid) -> Tensor:
    """`[F, rows * columns, D]` to `[F, D, rows, columns]`."""
    if tokens.shape[1] != grid[0] * grid[1]:
        raise InputError(f"{tokens.shape[1]} tokens do not form the grid of {grid[0]} x {grid[1]} that is pooled")
    return tokens.transpose(1, 2).reshape(-1, tokens.shape[2], *grid)


def _to_tokens(picture: Tensor) -> Tensor:
    """`[F, D, rows, columns]` to `[F, rows * columns, D]`."""
    return picture.flatten(2).transpose(1, 2)
