"""GPTQ and the scales of blocks, on matrices: what the paper says, and what rounding to nearest gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bridgeport.calibration.weight_only.blocks import positive_scales, round_to_nearest, signed_scales
from bridgeport.calibration.weight_only.gptq import gptq

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RANDOM.normal(size=shape).astype(np.float32)


def by_hand(weight: Any, hessian: Any, bits: int, size: int) -> Any:
    """Optimal brain surgery row by row, the inverse of what is left computed anew each time (paper, equation 2)."""
    left, values = weight.astype(np.float64), np.zeros(weight.shape)
    hessian = hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    for row in range(len(weight)):
        if row % size == 0:
            scales = signed_scales(left[None, row : row + size].astype(np.float32), bits)[0]
        values[row] = np.clip(np.rint(left[row] / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        inverse = np.linalg.inv(hessian[row:, row:])
        left[row:] -= np.outer(inverse[:, 0], (left[row] - values[row] * scales) / inverse[0, 0])
    return values


def test_gptq_is_that_of_the_paper() -> None:
    mixed = normal(400, 160) @ normal(160, 160)
    matrix, hessian = normal(160, 5), (mixed.T @ mixed).astype(np.float64)
    found = gptq(matrix, hessian, 4, 32, signed_scales)
    assert np.array_equal(found.values, by_hand(matrix, hessian, 4, 32))
    rounded = round_to_nearest(matrix, 4, 32, signed_scales)
    assert (found.values != rounded.values).mean() > 0.2
    errors = [np.square(mixed @ (one.dequantized() - matrix)).sum() for one in (found, rounded)]
    assert errors[0] < 0.5 * errors[1]


def test_columns_are_quantised_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """An LM head goes through some columns at a time; the result does not depend on how many."""
    matrix, inputs = normal(64, 50), normal(100, 64)
    hessian = (inputs.T @ inputs).astype(np.float64)

    def both() -> list[Any]:
        made = round_to_nearest(matrix, 4, 32, positive_scales), gptq(matrix, hessian, 4, 32, positive_scales)
        return [one.dequantized() for one in made]

    whole = both()
    monkeypatch.setattr("bridgeport.calibration.weight_only.blocks._COLUMNS", 7)
    for part, expected in zip(both(), whole, strict=True):
        # Products of other shapes sum in another order, which may move a weight that lies between two levels.
        assert (part == expected).mean() > 0.999


@pytest.mark.parametrize("rule", [signed_scales, positive_scales])
def test_gptq_without_correlation_is_rounding(rule: Any) -> None:
    """K is no multiple of the block, one input is always 0, and one column of weights is."""
    matrix = normal(150, 7)
    matrix[:, 3] = 0
    hessian = np.eye(150)
    hessian[4, 4] = 0
    found, expected = gptq(matrix, hessian, 4, 32, rule), round_to_nearest(matrix, 4, 32, rule)
    assert np.array_equal(found.values, expected.values)
    assert np.array_equal(found.scales, expected.scales)
    assert not found.dequantized()[:, 3].any()


def test_positive_scales_lose_less_than_covering_the_largest() -> None:
    matrix = normal(1, 64, 200)
    chosen = positive_scales(matrix, 4)
    covering = np.abs(matrix).max(axis=1) / 7
    assert (chosen > 0).all()
    errors = [
        np.square(np.clip(np.rint(matrix / s[:, None]), -8, 7) * s[:, None] - matrix).mean() for s in (chosen, covering)
    ]
    assert errors[0] < 0.9 * errors[1]
    assert (positive_scales(matrix * 1e-30, 4).astype(np.float16) > 0).all(), "a scale must survive FP16"
