"""Each figure sees what the others hide, and a gate breaks on each of them alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bridgeport.errors import UnsupportedError
from bridgeport.runtime.parity.drill import first_departure
from bridgeport.runtime.parity.gates import (
    EXACT,
    FP8,
    FP16,
    FP32,
    FP32_LOGITS,
    INT8,
    INT8_CHAIN,
    STAGES,
    choose_gates,
    coarsest,
    score_gate,
)
from bridgeport.runtime.parity.metrics import (
    ABSOLUTE_FLOOR,
    Difference,
    Gate,
    compare,
    compare_ids,
    token_cosines,
    unreached,
    worst_of,
)

RNG = np.random.default_rng(0)


def tokens(*shape: int) -> NDArray[Any]:
    return RNG.normal(size=shape).astype(np.float32)


def test_figures_by_hand() -> None:
    """Two tokens of two numbers: RMS 2.5, one error of 1, and one token turned by 90 degrees."""
    reference = np.array([[3.0, 4.0], [0.0, 0.0], [5.0, 0.0], [0.0, 0.0]], np.float32)[[0, 2]]
    actual = np.array([[3.0, 3.0], [0.0, 5.0]], np.float32)
    found = compare(reference, actual)
    assert found.scale == pytest.approx(math.sqrt((9 + 16 + 25) / 4))
    assert found.max_abs == 5.0
    assert found.mean_abs == pytest.approx((0 + 1 + 5 + 5) / 4)
    assert found.max_rel == pytest.approx(5.0 / found.scale)
    assert found.mean_rel == pytest.approx(2.75 / found.scale)
    assert found.min_token_cosine == pytest.approx(0.0)
    assert found.where == (1, 0)
    assert found.worst_token == (1,)


def test_one_swapped_token_among_hundreds_shows_in_the_worst_cosine_alone() -> None:
    """Token 200 is small and turned: of 300 tokens it moves the mean by 3e-5 of the scale."""
    reference = tokens(300, 64)
    reference[200] *= 1e-2
    actual = reference.copy()
    actual[200] = actual[200, ::-1]
    found = compare(reference, actual)
    assert found.mean_rel < 1e-4
    assert found.max_rel < 0.06
    assert found.min_token_cosine < 0.5
    assert found.worst_token == (200,)
    assert Gate(max_abs=0.1, mean_abs=1e-3, min_token_cosine=0.9).broken(found) == ("min_token_cosine",)


def test_one_wrong_value_shows_in_the_maximum_alone() -> None:
    reference = tokens(50, 512)
    actual = reference.copy()
    actual[7, 9] += 0.05
    found = compare(reference, actual)
    assert found.where == (7, 9)
    assert Gate(max_abs=1e-2, mean_abs=1e-5, min_token_cosine=0.999).broken(found) == ("max_abs",)


def test_drift_of_every_value_shows_in_the_mean_alone() -> None:
    reference = tokens(50, 512)
    found = compare(reference, reference * np.float32(1 + 1e-4))
    assert Gate(max_abs=1e-2, mean_abs=1e-5, min_token_cosine=1 - 1e-9).broken(found) == ("mean_abs",)


def test_outlier_channel_does_not_hide_an_error() -> None:
    """One channel of 100 stretches the maximum to 400 times the RMS of the others; the scale grows by 10 only."""
    reference = tokens(64, 1600)
    reference[:, 3] = 400.0
    actual = reference.copy()
    actual[5, 8] += 0.05
    found = compare(reference, actual)
    assert found.max_rel > FP32.max_abs * 40


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_infinitely_wrong(bad: float) -> None:
    reference = tokens(4, 8)
    actual = reference.copy()
    actual[2, 5] = bad
    found = compare(reference, actual)
    assert found.where == (2, 5)
    assert Gate(1e9, 1e9, -1.0).broken(found) == ("max_abs", "mean_abs")
    assert found.to_dict()["max_abs"] is None


def test_other_shape_is_told() -> None:
    found = compare(tokens(4, 8), tokens(4, 9))
    assert found.note == "shape is [4, 9], PyTorch has [4, 8]"
    assert FP32.broken(found) == ("max_abs", "mean_abs", "min_token_cosine")


def test_noise_around_zero_has_no_direction() -> None:
    """A row of a flat picture is 0 after normalisation, up to rounding: its direction means nothing."""
    zero = np.zeros((2, 16))
    noise = np.full((2, 16), ABSOLUTE_FLOOR / 2)
    assert token_cosines(zero, noise).tolist() == [1.0, 1.0]
    assert not EXACT.broken(compare(zero.astype(np.float32), noise.astype(np.float32)))
    assert token_cosines(zero, np.ones((2, 16))).tolist() == [0.0, 0.0]


def test_equal_values_pass_every_gate() -> None:
    value = tokens(3, 7, 5)
    found = compare(value, value.copy())
    assert (found.max_abs, found.mean_abs, found.min_token_cosine) == (0.0, 0.0, 1.0)
    assert not EXACT.broken(found)
    assert compare(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32)).max_abs == 0.0


@pytest.mark.parametrize(
    ("actual", "share", "note"),
    [
        ([5, 6, 7, 8], 0.0, ""),
        ([5, 9, 7, 9], 0.5, "2 of 4 differ, first at 1: 9, PyTorch has 6"),
        ([5, 6, 7], 0.25, "1 of 4 differ, first at 3: nothing, PyTorch has 8"),
        ([5, 6, 7, 8, 1], 0.2, "1 of 5 differ, first at 4: 1, PyTorch has nothing"),
        ([], 1.0, "4 of 4 differ, first at 0: nothing, PyTorch has 5"),
    ],
)
def test_ids(actual: list[int], share: float, note: str) -> None:
    found = compare_ids([5, 6, 7, 8], actual)
    assert found.mean_abs == share
    assert found.note == note
    assert bool(EXACT.broken(found)) == (share > 0)


def test_worst_of_takes_each_figure_from_where_it_is_worst() -> None:
    first = Difference(1.0, 0.5, 0.1, 0.05, 0.9, 10.0, (1,), (2,))
    second = Difference(0.5, 0.6, 0.5, 0.6, 0.95, 1.0, (3,), (4,))
    found = worst_of([first, second])
    assert (found.max_abs, found.mean_abs, found.max_rel, found.mean_rel) == (1.0, 0.6, 0.5, 0.6)
    assert (found.min_token_cosine, found.worst_token, found.where) == (0.9, (2,), (3,))


def step(max_rel: float, mean_rel: float) -> Difference:
    return Difference(max_rel, mean_rel, max_rel, mean_rel, 1.0, 1.0)


@pytest.mark.parametrize(
    ("steps", "at"),
    [
        ([step(1e-6, 1e-7), step(5e-6, 5e-7), step(2e-5, 2e-6)], None),
        ([step(1e-6, 1e-7), step(5e-5, 1e-7), step(6e-5, 1e-6)], 1),
        ([step(1e-6, 1e-7), step(1e-6, 5e-6)], 1),
        ([step(0, 0), step(1e-5, 1e-6)], None),
        ([step(1.0, 1.0), step(1.0, 1.0)], 0),
        ([], None),
    ],
    ids=["rounding-grows", "one-value", "drift", "from-zero", "first-at-once", "nothing"],
)
def test_departure_is_a_jump(steps: list[Difference], at: int | None) -> None:
    assert first_departure(steps, FP32) == at


def test_unreached_has_no_finite_error_in_json() -> None:
    document = unreached("the chain stopped").to_dict()
    assert document["max_abs"] is None
    assert document["note"] == "the chain stopped"


def test_every_stage_has_gates_for_fp32() -> None:
    assert [stage.name for stage in STAGES] == [
        "pixels",
        "placeholder_ids",
        "encoder",
        "connector",
        "merged_embeddings",
        "first_logits",
        "tokens",
    ]
    assert all(stage.isolated["fp32"] is not None and stage.chained["fp32"] is not None for stage in STAGES)


def with_precisions(**precisions: str) -> Any:
    """A manifest whose stages have these precisions, FP32 where none is named."""

    class Record:
        def __init__(self, precision: str) -> None:
            self.precision = precision

    class Manifest:
        def stage(self, name: str) -> Record:
            return Record(precisions.get(name, "fp32"))

    return Manifest()


def test_precision_without_gates_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no gates for encoder at int4, only for fp32, fp16, int8, fp8; export"):
        choose_gates(with_precisions(encoder="int4"))


def test_a_chain_is_judged_by_its_coarsest_stage() -> None:
    gates = {one.stage.name: one for one in choose_gates(with_precisions(encoder="int8", connector="fp16"))}
    assert gates["pixels"].chained == gates["pixels"].isolated
    assert gates["encoder"].isolated == INT8
    assert gates["connector"].isolated == FP16
    assert gates["connector"].chained == INT8
    assert gates["first_logits"].isolated == FP32_LOGITS
    assert gates["first_logits"].chained == INT8_CHAIN
    # Tokens are told and not judged as soon as anything before them was rounded.
    assert gates["tokens"].isolated == EXACT
    assert gates["tokens"].chained is None


def test_every_precision_has_gates_for_what_it_reaches() -> None:
    for precision in ("fp16", "int8", "fp8"):
        plan = {"encoder": precision, "connector": precision, "llm": "fp16" if precision == "fp8" else precision}
        chosen = choose_gates(with_precisions(**plan, embed_tokens="fp16"))
        judged = [(one.isolated, one.chained) for one in chosen[:-1]]
        assert None not in {gate for pair in judged for gate in pair}
        # Coarser is wider.
        for alone, chain in judged:
            assert alone is not None
            assert chain is not None
            assert alone.max_abs <= chain.max_abs
            assert alone.min_token_cosine >= chain.min_token_cosine


@pytest.mark.parametrize("gate", [FP16, INT8, FP8])
def test_a_swapped_query_breaks_every_gate_of_features(gate: Gate) -> None:
    """Two tokens in each other's place, among 32 of unit norm: their own cosine falls, means hardly move."""
    expected = np.random.default_rng(0).normal(size=(1, 32, 64))
    actual = expected.copy()
    actual[0, [3, 9]] = actual[0, [9, 3]]
    assert "min_token_cosine" in gate.broken(compare(expected, actual))


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_scores_have_gates_at_every_precision(precision: str) -> None:
    assert score_gate(precision, logits=False).min_token_cosine < FP32.min_token_cosine
    assert score_gate(precision, logits=True).max_abs > FP32_LOGITS.max_abs
    assert coarsest([]) == "fp32"
    assert coarsest(["int8", precision]) == ("int8" if precision == "fp16" else precision)
    with pytest.raises(UnsupportedError, match="no gates for a bundle that scores at int4, only for fp32"):
        score_gate("int4", logits=True)
