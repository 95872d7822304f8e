"""LLaVA-NeXT checkpoints (Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge").

A picture is cut into tiles by the grid that fits its shape best (AnyRes); encoder and connector see tiles, and the run
time puts their features together: global view, then the grid row by row without padding, a learned newline at the end
of each row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import llava
from .stages import Layout, Stage


class NewlineProjector(nn.Module):
    """A projector, and the learned `image_newline` `[D]` that the run time places."""

    def __init__(self, projector: nn.Module, width: int) -> None:
        super().__init__()
        self.projector = projector
        self.image_newline = nn.Parameter(torch.empty(width))

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` to `image_features` `[B, N, D]`."""
        features: Tensor = self.projector(image_embeds)
        return features


def conditional_generation(config: Any) -> Layout:
    """`LlavaNextForConditionalGeneration` in the stages encoder, connector, embed_tokens and llm."""
    layout = llava.conditional_generation(config)
    connector = with_newline(layout.stages["connector"], config.text_config.hidden_size)
    return replace(layout, kind="llava-next", stages={**layout.stages, "connector": connector})


def with_newline(connector: Stage, width: int) -> Stage:
    """`connector` with the checkpoint's `model.image_newline`."""

    def stored(name: str) -> str:
        if name == "image_newline":
            return "model.image_newline"
        return connector.checkpoint_name(name.removeprefix("projector."))

    return Stage(lambda: NewlineProjector(connector.build(), width), stored, vectors=("image_newline",))
