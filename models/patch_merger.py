"""Patch merger: the patches of a square, which the encoder keeps side by side, become one token.

Wang et al. 2024, "Qwen2-VL" (arXiv 2409.12191), section 2.1; Bai et al. 2025, "Qwen2.5-VL" (arXiv 2502.13923) has an
RMSNorm in the place of the LayerNorm.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

EPS = 1e-6


class PatchMerger(nn.Module):
    """Normalise every patch, put `merge_size^2` of them side by side, two linear layers with a GELU between them.

    The names are those of the checkpoints: `ln_q`, `mlp.0`, `mlp.2`.
    """

    def __init__(
        self, width: int, output_width: int, *, merge_size: int = 2, norm: Literal["layer", "rms"] = "layer"
    ) -> None:
        super().__init__()
        self.merged_width = merge_size**2 * width
        self.ln_q = nn.LayerNorm(width, eps=EPS) if norm == "layer" else nn.RMSNorm(width, eps=EPS)
        self.mlp = nn.Sequential(
            nn.Linear(self.merged_width, self.merged_width), nn.GELU(), nn.Linear(self.merged_width, output_width)
        )

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[T, merge_size^2, Dv]`, or `[T * merge_size^2, Dv]` in that order, to `[T, D]`.

        Exported in the first form: an axis that must be a multiple of another number cannot be said in ONNX.
        """
        features: Tensor = self.mlp(self.ln_q(image_embeds).reshape(-1, self.merged_width))
        return features
