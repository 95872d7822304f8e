"""Image features into the prompt's embeddings, at positions that the prompt contract gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError


def merge_image_features(
    inputs_embeds: NDArray[Any], image_features: NDArray[Any], positions: Sequence[NDArray[np.int64]]
) -> None:
    """Write `image_features` `[B, Q, D]` into `inputs_embeds` `[B, S, D]`, in place.

    `positions[b]`: the `Q` indices into row `b`'s sequence, in the order of the features. Token ids play no
    part, so a prompt that spells the placeholder's name stays text. Raises EngineError when a row has another
    count of positions than of features, or one outside the sequence.
    """
    for row, at in enumerate(positions):
        count, length = image_features.shape[1], inputs_embeds.shape[1]
        if len(at) != count or at.min(initial=0) < 0 or at.max(initial=0) >= length:
            raise EngineError(
                f"prompt {row} has {len(at)} image positions in a sequence of {length}, the connector gives "
                f"{count} features; prompt contract and connector do not fit, export the bundle again"
            )
        inputs_embeds[row, at] = image_features[row]
