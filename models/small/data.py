"""Pictures as tensors, and batches of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .pictures import Example
from .recipe import Sizes
from .scenes import BACKGROUNDS, COLORS, KINDS, Question, Scene
from .text import PAD_ID

# CLIP's, which BLIP-2's image processor has as its default.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
# A patch belongs to a shape that covers at least this much of it.
MIN_COVERAGE = 0.12


@dataclass(frozen=True)
class PictureSet:
    """N pictures with their labels.

    ``pixels`` uint8 ``[N, 3, S, S]``; per patch (row by row) ``kinds`` and ``colors`` int64 ``[N, P]`` with 0
    for no shape, ``cells`` int64 ``[N, P]`` with -1; ``coverage`` float32 ``[N, P]``: the part of the patch that
    shapes cover; ``backgrounds`` int64 ``[N]``.
    """

    pixels: Tensor
    kinds: Tensor
    cells: Tensor
    colors: Tensor
    coverage: Tensor
    backgrounds: Tensor
    scenes: tuple[Scene, ...]
    questions: tuple[tuple[Question, ...], ...]

    def __len__(self) -> int:
        return len(self.scenes)

    @classmethod
    def join(cls, parts: Sequence[PictureSet]) -> PictureSet:
        """Several sets as one."""
        return cls(
            pixels=torch.cat([part.pixels for part in parts]),
            kinds=torch.cat([part.kinds for part in parts]),
            cells=torch.cat([part.cells for part in parts]),
            colors=torch.cat([part.colors for part in parts]),
            coverage=torch.cat([part.coverage for part in parts]),
            backgrounds=torch.cat([part.backgrounds for part in parts]),
            scenes=tuple(scene for part in parts for scene in part.scenes),
            questions=tuple(asked for part in parts for asked in part.questions),
        )


def pixel_values(pixels: Tensor) -> Tensor:
    """uint8 ``[B, 3, S, S]`` to what the processor gives: scaled to 0..1, then CLIP's mean and deviation."""
    mean, std = torch.tensor(IMAGE_MEAN)[:, None, None], torch.tensor(IMAGE_STD)[:, None, None]
    return (pixels.float() / 255 - mean) / std


def resize(image: Image.Image, size: int) -> Image.Image:
    """As BLIP-2's processor: squeezed to a square, bicubic."""
    return image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def patch_coverage(example: Example, sizes: Sizes) -> torch.Tensor:
    """The part of each patch that each shape covers, float32 ``[3, P]`` (zeros for absent shapes)."""
    square = Image.fromarray(example.mask).resize((sizes.image, sizes.image), Image.Resampling.NEAREST)
    grid, patch = sizes.image // sizes.patch, sizes.patch
    mask = torch.from_numpy(np.array(square)).reshape(grid, patch, grid, patch)
    shares = [(mask == number).float().mean(dim=(1, 3)).flatten() for number in (1, 2, 3)]
    return torch.stack(shares)


def tensorize(examples: Sequence[Example], sizes: Sizes) -> PictureSet:
    """Pixels and labels of pictures."""
    pixels = np.stack([np.asarray(resize(example.image, sizes.image)) for example in examples])
    shares = torch.stack([patch_coverage(example, sizes) for example in examples])
    kind = torch.zeros(len(examples), 4, dtype=torch.long)
    color = torch.zeros(len(examples), 4, dtype=torch.long)
    cell = torch.full((len(examples), 4), -1)
    for i, example in enumerate(examples):
        for number, shape in enumerate(example.scene.shapes, start=1):
            kind[i, number] = 1 + KINDS.index(shape.kind)
            cell[i, number] = shape.cell
            color[i, number] = 1 + COLORS.index(shape.color)
    most, owner = shares.max(dim=1)
    owner = torch.where(most >= MIN_COVERAGE, owner + 1, 0)
    return PictureSet(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        kinds=kind.gather(1, owner),
        cells=cell.gather(1, owner),
        colors=color.gather(1, owner),
        coverage=shares.sum(dim=1),
        backgrounds=torch.tensor([BACKGROUNDS.index(example.scene.background) for example in examples]),
        scenes=tuple(example.scene for example in examples),
        questions=tuple(example.questions for example in examples),
    )


def pad(rows: Sequence[Sequence[int]], value: int = PAD_ID) -> Tensor:
    """Rows of different lengths as int64 ``[B, T]``, padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
