"""Image features go to positions, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from bridgeport.errors import EngineError
from bridgeport.runtime.merge import merge_image_features


def test_each_row_has_its_own_positions() -> None:
    embeds = np.zeros((2, 5, 3), np.float32)
    features = np.arange(12, dtype=np.float32).reshape(2, 2, 3) + 1
    merge_image_features(embeds, list(features), [np.array([0, 1]), np.array([4, 2])])
    assert np.array_equal(embeds[0, :2], features[0])
    assert np.array_equal(embeds[1, [4, 2]], features[1])
    assert np.count_nonzero(embeds) == features.size


@pytest.mark.parametrize("positions", [[0], [0, 1, 2], [0, 5], [-1, 0]], ids=str)
def test_positions_that_do_not_fit(positions: list[int]) -> None:
    embeds = np.zeros((1, 5, 3), np.float32)
    with pytest.raises(EngineError, match=r"prompt 0 has \d image positions in a sequence of 5"):
        merge_image_features(embeds, [np.ones((2, 3), np.float32)], [np.array(positions)])
    assert not embeds.any()
