"""Linear and MLP projectors: every token of the encoder becomes one token of the language model.

Liu et al. 2023, "Visual Instruction Tuning" (arXiv 2304.08485): one linear layer (LLaVA 1.0). Liu et al. 2023,
"Improved Baselines with Visual Instruction Tuning" (arXiv 2310.03744): two with a GELU between them (LLaVA 1.5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from ..errors import CheckpointError
from .activations import find_activation


class LinearProjector(nn.Module):
    """One linear layer, `[B, N, Dv]` to `[B, N, D]`."""

    def __init__(self, input_width: int, output_width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(input_width, output_width, bias=bias)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` to `image_features` `[B, N, D]`."""
        features: Tensor = self.linear(image_embeds)
        return features


class MlpProjector(nn.Module):
    """Linear layers with an activation between them.

    `widths`: `[Dv, ..., D]`, one more than there are layers. `Dv` is a multiple of the encoder's width where the
    features of several of its layers stand side by side.
    """

    def __init__(self, widths: Sequence[int], *, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        if len(widths) < 2:
            raise CheckpointError(f"MLP projector of widths {list(widths)}: give an input and an output width at least")
        self.activation = find_activation(activation)
        self.layers = nn.ModuleList(nn.Linear(wide, narrow, bias=bias) for wide, narrow in pairwise(widths))

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` to `image_features` `[B, N, D]`."""
        first, *rest = self.layers
        x: Tensor = first(image_embeds)
        for layer in rest:
            x = layer(self.activation(x))
        return x


def transformers_names(num_layers: int = 2, *, bias: bool = True) -> dict[str, str]:
    """`MlpProjector`'s names to those of transformers' `multi_modal_projector`: `linear_1`, `linear_2`, ..."""
    return _names(num_layers, lambda i: f"linear_{i + 1}", bias)


def llava_names(num_layers: int = 2, *, bias: bool = True) -> dict[str, str]:
    """`MlpProjector`'s names to those of the LLaVA project's `mm_projector`, an `nn.Sequential`: 0, 2, 4, ..."""
    return _names(num_layers, lambda i: str(2 * i), bias)


def _names(num_layers: int, layer_name: Callable[[int], str], bias: bool) -> dict[str, str]:
    parts = ("weight", "bias") if bias else ("weight",)
    return {f"layers.{i}.{part}": f"{layer_name(i)}.{part}" for i in range(num_layers) for part in parts}
