"""The ViT (transformers' Blip2VisionModel), trained so that each patch tells its shape and colour."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2VisionConfig, Blip2VisionModel

from .data import PictureSet, pixel_values
from .recipe import Recipe, Sizes
from .scenes import BACKGROUNDS, CELLS, COLORS, KINDS
from .trainer import LossOf


def vision_config(sizes: Sizes) -> Blip2VisionConfig:
    return Blip2VisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=2 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_width // sizes.head_width,
        image_size=sizes.image,
        patch_size=sizes.patch,
        hidden_act="gelu",
        initializer_range=0.08,
    )


def position_embeddings(sizes: Sizes) -> Tensor:
    """Sines and cosines of row and column, ``[P, D]``: where the learned position embeddings start.

    As in MAE (arXiv 2111.06377). From random ones a ViT this small spends most of its training on finding out
    which patches are neighbours.
    """
    grid, quarter = sizes.image // sizes.patch, sizes.vision_width // 4
    frequencies = torch.pi * torch.logspace(-3, 0, quarter, base=2.0)
    angles = torch.arange(grid)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    return 0.5 * torch.cat([rows, columns], dim=2).flatten(0, 1)


class LabelledEncoder(nn.Module):
    """The encoder with the heads that train it and are then thrown away."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.vision = Blip2VisionModel(vision_config(sizes))
        with torch.no_grad():
            self.vision.embeddings.position_embedding[0, 1:] = position_embeddings(sizes)
        self.kind = nn.Linear(sizes.vision_width, len(KINDS))
        self.color = nn.Linear(sizes.vision_width, 1 + len(COLORS))
        self.cell = nn.Linear(sizes.vision_width, len(CELLS))
        self.background = nn.Linear(sizes.vision_width, len(BACKGROUNDS))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """uint8 ``[B, 3, S, S]`` to logits: kind ``[B, P, 5]``, colour ``[B, P, 7]``, ground ``[B, 4]``."""
        tokens = self.vision(pixel_values(pixels)).last_hidden_state
        patches = tokens[:, 1:]
        return self.kind(patches), self.color(patches), self.cell(patches), self.background(tokens[:, 0])


def mirrored(pictures: PictureSet, rows: Tensor, mirror: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures ``rows`` with their patch labels, left and right swapped where ``mirror`` bool ``[B]`` says so.

    Every shape is its own mirror image, so this doubles the pictures for nothing.
    """
    grid = math.isqrt(pictures.kinds.shape[1])
    pixels = pictures.pixels[rows]
    swapped = torch.tensor([-1, *(cell // 3 * 3 + 2 - cell % 3 for cell in range(len(CELLS)))])
    labels = {"kinds": pictures.kinds[rows], "colors": pictures.colors[rows], "cells": pictures.cells[rows]}
    turned = {name: value.view(-1, grid, grid).flip(-1).flatten(1) for name, value in labels.items()}
    turned["cells"] = swapped[turned["cells"] + 1]
    labels = {name: torch.where(mirror[:, None], turned[name], value) for name, value in labels.items()}
    return torch.where(mirror[:, None, None, None], pixels.flip(-1), pixels), labels


def encoder_loss(model: LabelledEncoder, pictures: PictureSet, recipe: Recipe) -> LossOf:
    """Cross-entropy of a random batch of pictures."""

    def loss_of(generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(pictures), (recipe.encoder.batch,), generator=generator)
        mirror = torch.rand(len(rows), generator=generator) < 0.5
        pixels, labels = mirrored(pictures, rows, mirror)
        kind, color, cell, background = model(pixels)
        return {
            # Of patches with a shape alone (so is the cell): among all patches, nine in ten empty, these would drown.
            "shape": F.cross_entropy(kind.flatten(0, 1), labels["kinds"].flatten() - 1, ignore_index=-1),
            "cell": F.cross_entropy(cell.flatten(0, 1), labels["cells"].flatten(), ignore_index=-1),
            "color": F.cross_entropy(color.flatten(0, 1), labels["colors"].flatten()),
            "background": F.cross_entropy(background, pictures.backgrounds[rows]),
        }

    return loss_of


@torch.no_grad()
def encode(vision: Blip2VisionModel, pixels: Tensor, batch: int = 256) -> Tensor:
    """Tokens of many pictures, ``[N, 1 + P, D]`` float32: the frozen encoder is run once, not every step."""
    parts = [pixels[start : start + batch] for start in range(0, len(pixels), batch)]
    return torch.cat([vision(pixel_values(part)).last_hidden_state for part in parts])
