"""Pixel shuffle: a square of neighbouring tokens becomes one token, its channels side by side.

Shi et al. 2016 (arXiv 1609.05158), read backwards: space to depth. Chen et al. 2024, "How Far Are We to GPT-4V?"
(InternVL 1.5, arXiv 2404.16821) puts a LayerNorm and two linear layers behind it, Laurençon et al. 2024, "Building and
better understanding vision-language models" (Idefics3, arXiv 2408.12637) one linear layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import CheckpointError, InputError
from .projector import MlpProjector


class PixelShuffle(nn.Module):
    """`grid`: rows and columns of tokens; `factor` x `factor` of them become one."""

    def __init__(self, grid: tuple[int, int], factor: int) -> None:
        super().__init__()
        if factor < 1 or grid[0] % factor or grid[1] % factor:
            raise CheckpointError(
                f"pixel shuffle: {grid[0]} x {grid[1]} tokens cannot be cut into squares of {factor} x {factor}"
            )
        self.grid = grid
        self.factor = factor
        self.output_grid = (grid[0] // factor, grid[1] // factor)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` `[B, rows * columns, D]` to `[B, rows * columns / factor^2, factor^2 * D]`.

        The channels of one square come row by row, as its tokens do.
        """
        rows, columns = self.output_grid
        if tokens.shape[1] != self.grid[0] * self.grid[1]:
            raise InputError(f"{tokens.shape[1]} tokens do not form the grid of {self.grid[0]} x {self.grid[1]}")
        squares = tokens.reshape(-1, rows, self.factor, columns, self.factor, tokens.shape[2])
        return squares.transpose(2, 3).reshape(-1, rows * columns, self.factor**2 * tokens.shape[2])


class PixelShuffleLinear(nn.Module):
    """Idefics3's and SmolVLM's connector: pixel shuffle, then one linear layer without bias."""

    def __init__(self, grid: tuple[int, int], factor: int, width: int, output_width: int) -> None:
        super().__init__()
        self.shuffle = PixelShuffle(grid, factor)
        self.projection = nn.Linear(factor**2 * width, output_width, bias=False)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` to `image_features` `[B, N / factor^2, D]`."""
        features: Tensor = self.projection(self.shuffle(image_embeds))
        return features


class PixelShuffleMlp(nn.Module):
    """InternVL's connector: pixel shuffle, LayerNorm, two linear layers with an activation between them."""

    def __init__(
        self, grid: tuple[int, int], factor: int, width: int, output_width: int, *, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.shuffle = PixelShuffle(grid, factor)
        self.norm = nn.LayerNorm(factor**2 * width)
        self.mlp = MlpProjector([factor**2 * width, output_width, output_width], activation=activation)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` to `image_features` `[B, N / factor^2, D]`."""
        features: Tensor = self.mlp(self.norm(self.shuffle(image_embeds)))
        return features
