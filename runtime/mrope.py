"""M-RoPE's positions (Wang et al. 2024, arXiv 2409.12191, section 2.1): time, height and width of every token.

They are computed here and not in the graph, because they follow from where the pictures stand in the prompt and how
large they are. Equal to transformers' `Qwen2VLModel.get_rope_index`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from ..models.contract import StageContract
from .processor.picture import PictureTensors
from .processor.tiling.pooling import pooled_size

AXES = 3
INPUT = "position_ids"


@dataclass(frozen=True)
class ImageSpan:
    """A picture in a prompt: index of its first token, and its tokens in time, height and width."""

    start: int
    grid: tuple[int, int, int]


def takes_positions(llm: StageContract) -> bool:
    """Whether this language model's positions come in as `position_ids` `[3, B, S]`."""
    return any(spec.name == INPUT for spec in llm.inputs)


def rope_index(length: int, images: Sequence[ImageSpan]) -> NDArray[np.int64]:
    """Positions `[3, length]` of one prompt of `length` tokens, its pictures in order.

    Text has the same number on all axes and counts on by 1. A picture's tokens have their place in its grid, counted
    from where the text stopped; the text behind it goes on after the longer one of height and width. Raises
    EngineError for pictures that overlap or reach beyond the prompt.
    """
    positions = np.zeros((AXES, length), np.int64)
    at = position = 0
    for image in images:
        end = image.start + int(np.prod(image.grid))
        if image.start < at or end > length:
            raise EngineError(
                f"a picture of {image.grid} tokens stands at {image.start} of {length}, the one before it ends at "
                f"{at}; prompt contract and picture do not fit, export the bundle again"
            )
        positions[:, at : image.start] = np.arange(position, position + image.start - at)
        position += image.start - at
        positions[:, image.start : end] = position + np.indices(image.grid).reshape(AXES, -1)
        position += max(image.grid[1:])
        at = end
    positions[:, at:] = np.arange(position, position + length - at)
    return positions


class MRopePositions:
    """`position_ids` of the prompts of a batch and of every token after them."""

    def __init__(self, lengths: NDArray[np.int64], images: Sequence[Sequence[ImageSpan]]) -> None:
        """`lengths` `[B]`; `images`: the pictures of each row."""
        self._prompts = np.zeros((AXES, len(lengths), int(lengths.max())), np.int64)
        self._deltas = np.zeros(len(lengths), np.int64)
        for row, (length, spans) in enumerate(zip(lengths.tolist(), images, strict=True)):
            positions = rope_index(length, spans)
            self._prompts[:, row, :length] = positions
            # Pictures take up fewer positions than tokens: from here on a row is that far from its token count.
            self._deltas[row] = positions.max() + 1 - length
        self._next = np.zeros((AXES, len(lengths), 1), np.int64)

    def prefill(self) -> dict[str, NDArray[Any]]:
        """`position_ids` int64 `[3, B, S]`; 0 for what pads a row."""
        return {INPUT: self._prompts}

    def step(self) -> dict[str, NDArray[Any]]:
        """`position_ids` int64 `[3, B, 1]`: one array for all steps, which `advance` writes."""
        return {INPUT: self._next}

    def advance(self, lengths: NDArray[np.int64]) -> None:
        """For tokens that make the rows `lengths` `[B]` long: the same number on all axes."""
        self._next[:] = (lengths - 1 + self._deltas)[:, None]


def positions_of(
    lengths: NDArray[np.int64],
    image_positions: Sequence[NDArray[np.int64]],
    pictures: Sequence[Sequence[PictureTensors]],
    merge_size: int,
    pool_stride: int = 1,
) -> MRopePositions:
    """Positions of prepared prompts.

    `image_positions`: per row, where its image tokens are, picture after picture. `pictures`: per row, with
    `image_grid_thw` `[1, 3]` in patches, of which `merge_size` squared make a feature. Windows of `pool_stride` squared
    features make a token.
    """
    rows = []
    for at, row in zip(image_positions, pictures, strict=True):
        starts = np.cumsum([0, *(len(picture.rows) for picture in row)])[:-1]
        grids = [_grid(picture, merge_size, pool_stride) for picture in row]
        rows.append([ImageSpan(int(at[i]), grid) for i, grid in zip(starts, grids, strict=True)])
    return MRopePositions(lengths, rows)


def _grid(picture: PictureTensors, merge_size: int, pool_stride: int) -> tuple[int, int, int]:
    time, height, width = (int(n) for n in picture.tensors["image_grid_thw"][0])
    return time, *pooled_size((height // merge_size, width // merge_size), pool_stride)
