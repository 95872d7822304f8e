"""Flamingo's pictures (Alayrac et al. 2022, arXiv 2204.14198): read by cross-attention, which the prompt goes through.

Their latents become keys and values once for a prompt; which of them a token sees follows from where the pictures stand
(section 3.1.3 there, as transformers' `IdeficsProcessor` does it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from ..models.flamingo_contract import FlamingoContract
from .engine import Engine

MASK = "image_attention_mask"


@dataclass(frozen=True)
class ImageMemory:
    """Inputs of every step: keys and values that are bound once and read where they lie, and who sees what.

    `prompts` int64 `[B, S, images]`, `answers` `[B, 1, images]`: 1 where a token sees a picture.
    """

    key_values: dict[str, NDArray[Any]]
    prompts: NDArray[np.int64]
    answers: NDArray[np.int64]

    def prefill(self) -> dict[str, NDArray[Any]]:
        """For the prompts."""
        return {MASK: self.prompts, **self.key_values}

    def step(self) -> dict[str, NDArray[Any]]:
        """For every later token: the same arrays each time."""
        return {MASK: self.answers, **self.key_values}

    def advance(self, lengths: NDArray[np.int64]) -> None:
        """An answer goes on seeing what the prompt's last token saw."""


def visible_images(
    input_ids: NDArray[np.int64], images: int, *, image_token_id: int, end_of_document_id: int | None
) -> NDArray[np.int64]:
    """`[S, images]`, 1 where a token of the prompt `input_ids` `[S]` sees a picture.

    Each sees the last picture that begins at it or before it, and none behind the end of that picture's document.
    """
    seen = np.zeros((len(input_ids), images), np.int64)
    current, ended = -1, False
    for row, token in zip(seen, input_ids.tolist(), strict=True):
        if token == image_token_id:
            current, ended = current + 1, False
        if 0 <= current < images and not ended:
            row[current] = 1
        ended = ended or token == end_of_document_id
    return seen


def read_images(
    cross_kv: Engine,
    contract: FlamingoContract,
    input_ids: Sequence[NDArray[np.int64]],
    image_token_id: int,
    image_features: Sequence[NDArray[np.float32]],
) -> ImageMemory:
    """What the language model reads of the pictures of a batch.

    `input_ids`: the prompts. `image_features`: per prompt, the latents of its pictures, `[images * latents, Dv]`.
    Raises EngineError when a prompt has another count of image tokens than of pictures.
    """
    counts = [len(features) // contract.latents for features in image_features]
    for row, (ids, features, count) in enumerate(zip(input_ids, image_features, counts, strict=True)):
        tokens = int((ids == image_token_id).sum())
        if tokens * contract.latents != len(features):
            raise EngineError(
                f"prompt {row} has {tokens} image tokens, the connector gives {len(features)} latents, "
                f"{contract.latents} for each of {count} pictures; export the bundle again"
            )
    # Without a picture there is still one of zeros, which no token sees, as in transformers' processor.
    images, length = max(1, *counts), max(len(ids) for ids in input_ids)
    width = int(cross_kv.contract.input("image_features").shape[-1])
    padded = np.zeros((len(counts), images * contract.latents, width), np.float32)
    prompts = np.zeros((len(counts), length, images), np.int64)
    answers = np.zeros((len(counts), 1, images), np.int64)
    for row, (ids, features) in enumerate(zip(input_ids, image_features, strict=True)):
        padded[row, : len(features)] = features
        prompts[row, : len(ids)] = visible_images(
            ids, images, image_token_id=image_token_id, end_of_document_id=contract.end_of_document_id
        )
        answers[row, 0] = prompts[row, len(ids) - 1]
    return ImageMemory(cross_kv.run({"image_features": padded}), prompts, answers)
