"""The strength of smoothing: the paper's scale, and the alpha that is searched for each group."""

from __future__ import annotations

from typing import Any

import numpy as np
from tests.calibration.outliers import stats_of

from bridgeport.calibration.smooth_search import Choice, Products, choose_alpha, smoothing_scale


def test_the_scale_is_the_papers() -> None:
    """Equation 4 by hand: the roots of (1, 16, 1, 9), whose median in logarithms is the root of 3."""
    scale = smoothing_scale(np.array([2, 16, 2, 9], "f4"), np.array([2, 1, 2, 1], "f4"), 0.5)
    np.testing.assert_allclose(scale, np.array([1, 4, 1, 3]) / np.sqrt(3), rtol=1e-6)


def test_dead_channels_keep_scale_one() -> None:
    scale = smoothing_scale(np.array([0, 4, 4], "f4"), np.array([1, 0, 1], "f4"), 0.5)
    np.testing.assert_array_equal(scale, np.ones(3, "f4"))


def test_few_rows_do_not_lure_into_strong_smoothing() -> None:
    """On 24 rows of noise the error on the same rows falls with alpha up to 0.9; on unseen rows it rises."""
    rng = np.random.default_rng(0)
    stats = stats_of(rng.normal(size=(24, 64)).astype("f4"))
    products = Products([rng.normal(size=(64, 32)).astype("f4")], 512)
    choice = choose_alpha(stats, products, (None, 0.3, 0.5, 0.9), bits=8, needs_mul=False, max_rows=128)
    assert choice.alpha in (None, 0.3)
    assert choice.error <= choice.error_off


def test_outliers_are_smoothed_and_an_extra_mul_must_pay() -> None:
    rng = np.random.default_rng(0)
    rows, matrix = rng.normal(size=(64, 64)).astype("f4"), rng.normal(size=(64, 32)).astype("f4")
    options: dict[str, Any] = {"bits": 8, "max_rows": 128}
    alphas = (None, 0.3, 0.5, 0.7)

    def choose(factor: float, *, needs_mul: bool) -> Choice:
        times = np.where(np.arange(64) == 7, factor, 1).astype("f4")
        products = Products([matrix / times[:, None]], 512)
        return choose_alpha(stats_of(rows * times), products, alphas, needs_mul=needs_mul, **options)

    assert choose(3, needs_mul=False).alpha is not None  # worth a scale that costs nothing,
    assert choose(3, needs_mul=True).alpha is None  # but not an operator
    choice = choose(100, needs_mul=True)
    assert choice.alpha is not None
    assert choice.error < choice.error_off / 2
