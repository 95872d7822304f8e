"""Observers against numpy, and against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bridgeport.calibration.observers import ObserverSettings, TensorObserver
from bridgeport.calibration.records import TensorRange, TensorStats
from bridgeport.errors import InputError

Floats = NDArray[np.float32]


def observe(samples: list[Floats], *, channels: bool = True, **options: Any) -> TensorStats:
    observer = TensorObserver("x", ObserverSettings(**options), channels=channels)
    for index, sample in enumerate(samples):
        assert observer.update(sample, index)
    return observer.finish()


def heavy_tailed(seed: int = 0) -> Floats:
    """A concentrated bulk, a few channels 100 times as large, and one value that is 4000 times as large."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((2000, 128), dtype=np.float32) * np.float32(0.25)
    values[:, 3] *= 100
    values[17, 5] = 1000.0
    return values


def quantised_error(values: Floats, chosen: TensorRange) -> float:
    step = chosen.absmax / 127
    return float(((np.clip(np.rint(values / step), -128, 127) * step - values).astype(np.float64) ** 2).sum())


def test_minmax_is_exact_per_tensor_and_channel() -> None:
    samples = [heavy_tailed(seed)[:400].reshape(4, 100, 128) for seed in range(3)]
    stats = observe(samples)
    rows = np.concatenate(samples).reshape(-1, 128)
    assert stats.ranges["minmax"] == TensorRange(float(rows.min()), float(rows.max()))
    assert (stats.minimum, stats.maximum) == (rows.min(), rows.max())
    np.testing.assert_array_equal(stats.channel_min, rows.min(axis=0))
    np.testing.assert_array_equal(stats.channel_max, rows.max(axis=0))


def test_moving_average_is_that_of_the_samples_extremes() -> None:
    samples = [np.array([[-1, 2]], np.float32), np.array([[-3, 3]], np.float32), np.array([[-2, 100]], np.float32)]
    assert observe(samples).ranges["moving-average"] == pytest.approx(TensorRange(-2.0, 35.0))
    newest = observe(samples, averaging=0.5).ranges["moving-average"]
    assert newest == TensorRange(-2.0, 51.25)  # ((-1 - 3) / 2 - 2) / 2, ((2 + 3) / 2 + 100) / 2


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 99.999, 100.0])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_percentile_is_numpys(percentile: float, scale: float) -> None:
    """Within a bin, 2^-10 of the value. Neighbours in the list of digits differ by far more (asserted below)."""
    values = heavy_tailed() * np.float32(scale)
    chosen = observe(np.split(values, 8), percentile=percentile).ranges["percentile"]
    expected = np.percentile(values.astype(np.float64), [100 - percentile, percentile])
    np.testing.assert_allclose([chosen.low, chosen.high], expected, rtol=1.1e-3)


def test_digits_of_the_percentile_matter() -> None:
    """99.9 cuts into the large channel that 99.999 keeps; a histogram of equal widths would not know the difference."""
    values = heavy_tailed()
    coarse, fine = (observe([values], percentile=p).ranges["percentile"] for p in (99.9, 99.999))
    assert fine.absmax > 1.5 * coarse.absmax
    assert fine.absmax < 200  # the one value of 1000 is outside


def test_counts_do_not_depend_on_the_order_of_samples() -> None:
    """Growing moves every count to the bin that it would have been in: small samples first and large ones first."""
    rng = np.random.default_rng(0)
    samples: list[Floats] = [(rng.standard_normal((64, 8)) * 10.0**power).astype(np.float32) for power in range(-9, 10)]
    forward, backward = TensorObserver("x", ObserverSettings()), TensorObserver("x", ObserverSettings())
    for index, sample in enumerate(samples):
        forward.update(sample, index)
        backward.update(samples[-1 - index], index)
    np.testing.assert_array_equal(forward.state()["counts"], backward.state()["counts"])
    assert forward.state()["counts"].sum() == 19 * 512
    assert {name: forward.finish().ranges[name] for name in ("percentile", "mse", "entropy")} == {
        name: backward.finish().ranges[name] for name in ("percentile", "mse", "entropy")
    }


def test_extreme_floats_are_counted() -> None:
    """Zero, the smallest and the largest float32, and what a window of 32 octaves cannot hold together."""
    tiny, huge = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    stats = observe([np.array([[0.0, tiny, -tiny, 1.0, -1.0, huge, -huge]], np.float32)])
    assert stats.ranges["minmax"] == TensorRange(float(-huge), float(huge))
    assert all(np.isfinite([one.low, one.high]).all() for one in stats.ranges.values())
    small = observe([np.full((4, 4), tiny, np.float32), np.zeros((4, 4), np.float32)])
    assert small.ranges["percentile"].absmax <= tiny


def test_mse_is_the_best_threshold() -> None:
    """No threshold of a fine brute-force search over the values themselves is better by more than 1 %."""
    values = np.random.default_rng(0).laplace(size=(2000, 100)).astype(np.float32)
    values[0, 0] = 60.0
    chosen = observe(np.split(values, 4)).ranges["mse"]
    candidates = np.linspace(0.02, 1.0, 50) * 60.0
    best = min(quantised_error(values, TensorRange(-float(c), float(c))) for c in candidates)
    error = quantised_error(values, chosen)
    assert error <= 1.01 * best
    assert error < 0.5 * quantised_error(values, TensorRange(-60.0, 60.0))  # min-max


def test_mse_of_an_asymmetric_range_uses_all_levels() -> None:
    """A GELU's output: 255 steps from its minimum up can clip less than 127 steps on each side of 0."""
    values = (np.abs(np.random.default_rng(0).standard_t(3, size=(400, 100))) - 0.17).astype(np.float32)
    symmetric, asymmetric = (observe([values], symmetric=flag).ranges["mse"] for flag in (True, False))
    assert symmetric.low == asymmetric.low == values.min()
    assert asymmetric.high > symmetric.high


def test_entropy_clips_a_lone_outlier_and_keeps_a_uniform_range() -> None:
    rng = np.random.default_rng(0)
    values: Floats = rng.standard_normal((1000, 100), dtype=np.float32)
    bulk = float(np.abs(values).max())
    values[0, 0] = 40.0
    chosen = observe([values]).ranges["entropy"]
    assert 0.5 * bulk < chosen.absmax < 1.2 * bulk
    uniform: Floats = rng.uniform(-1, 1, size=(1000, 100)).astype(np.float32)
    assert observe([uniform]).ranges["entropy"].absmax > 0.98


def test_entropy_is_not_drawn_to_exact_zeros() -> None:
    """Half of the values are 0 after a ReLU; the range is that of the other half."""
    values: Floats = np.random.default_rng(0).standard_normal((1000, 100), dtype=np.float32).clip(0)
    positive = values[values > 0]
    with_zeros, without = observe([values]), observe([positive[: positive.size // 100 * 100].reshape(-1, 100)])
    assert with_zeros.ranges["entropy"].high == pytest.approx(without.ranges["entropy"].high, rel=0.05)


def test_rows_are_real_rows_drawn_evenly_from_all_samples() -> None:
    offsets = np.arange(100)[:, None] / 128 + np.zeros(4)
    samples: list[Floats] = [(index + offsets).astype(np.float32) for index in range(8)]
    rows = observe(samples, rows=200).rows
    assert rows is not None
    assert rows.shape == (200, 4)
    everything = {tuple(row) for row in np.concatenate(samples)}
    assert {tuple(row) for row in rows} <= everything
    assert len({tuple(row) for row in rows}) == 200
    drawn = np.bincount(rows[:, 0].astype(int), minlength=8)
    assert drawn.min() >= 10  # 25 expected, 4.4 standard deviation: a draw from the first or last samples fails
    assert drawn.max() <= 40
    assert not np.array_equal(np.sort(rows[:, 0]), np.sort(np.asarray(observe(samples, rows=200, seed=1).rows)[:, 0]))


def test_few_rows_are_all_kept() -> None:
    samples = [heavy_tailed()[:3], heavy_tailed()[3:5]]
    rows = observe(samples, rows=512).rows
    assert rows is not None
    np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(np.concatenate(samples), axis=0))


@pytest.mark.parametrize("shapes", [[(3, 7), (3, 5)], [(4,), (4,)], [(), ()]])
def test_no_channels_where_the_last_axis_has_none(shapes: list[tuple[int, ...]]) -> None:
    stats = observe([np.ones(shape, np.float32) * index for index, shape in enumerate(shapes)])
    assert stats.channel_min is None
    assert stats.channel_max is None
    assert stats.rows is None
    assert (stats.minimum, stats.maximum) == (0.0, 1.0)


def test_memory_is_bounded() -> None:
    """The state after many samples is as large as that after few."""

    def size(samples: int) -> int:
        observer = TensorObserver("x", ObserverSettings(rows=16))
        for index in range(samples):
            observer.update(np.full((64, 8), index, np.float32), index)
        return sum(array.nbytes for array in observer.state().values())

    assert size(40) == size(2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_changes_nothing(bad: float) -> None:
    observer = TensorObserver("x", ObserverSettings())
    assert observer.update(np.ones((2, 2), np.float32), 0)
    before = {name: array.copy() for name, array in observer.state().items()}
    assert not observer.update(np.array([[1.0, bad], [2.0, 3.0]], np.float32), 1)
    for name, array in observer.state().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"observers": ("minmax", "median")}, "median"),
        ({"observers": ()}, "one or more"),
        ({"percentile": 0.99999}, "more than 50"),
        ({"percentile": float("nan")}, "more than 50"),
        ({"averaging": 0.0}, "averaging"),
        ({"bits": 16}, "2 to 8"),
        ({"rows": -1}, "0 or more"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ObserverSettings(**options)
