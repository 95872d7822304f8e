"""Image features into the prompt's embeddings, at positions that the prompt contract gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from .engine import DeviceMemory


def merge_image_features(
    inputs_embeds: NDArray[Any],
    image_features: Sequence[NDArray[Any]],
    positions: Sequence[NDArray[np.int64]],
    memory: DeviceMemory | None = None,
) -> None:
    """Write row `b`'s `image_features[b]` `[T, D]` into `inputs_embeds[b]` `[S, D]`, in place.

    `positions[b]`: the `T` indices into the row's sequence, in the order of the features; a row without pictures has
    none. `memory`: where `inputs_embeds` is, if not on the host. Raises EngineError when a row has another count of
    positions than of features, or one outside the sequence.
    """
    length = inputs_embeds.shape[1]
    for row, (features, at) in enumerate(zip(image_features, positions, strict=True)):
        if len(at) != len(features) or at.min(initial=0) < 0 or at.max(initial=0) >= length:
            raise EngineError(
                f"prompt {row} has {len(at)} image positions in a sequence of {length}, the connector gives "
                f"{len(features)} features; prompt contract and connector do not fit, export the bundle again"
            )
        if memory is None:
            inputs_embeds[row, at] = features
        else:
            memory.put(inputs_embeds[row], at, features)
