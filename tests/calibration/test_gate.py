"""Verdicts of the gate, from figures."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bridgeport.calibration.gate import MIN_COSINE, GateLimits, GateReport, judge_stage, judge_task
from bridgeport.calibration.task import TaskScore
from bridgeport.errors import InputError
from bridgeport.export.options import PRECISIONS
from bridgeport.runtime.parity.metrics import Difference, compare

TIMES = (10.0, 8.0, 0.8)


def with_cosine(value: float) -> Difference:
    return replace(compare(np.ones((1, 4)), np.ones((1, 4))), min_token_cosine=value)


def score(wrong: int, total: int = 100) -> TaskScore:
    return TaskScore(np.array([number >= wrong for number in range(total)]), ("answer",) * total, ("",) * total)


def test_every_precision_has_a_limit() -> None:
    assert set(MIN_COSINE) == set(PRECISIONS)
    ordered = [MIN_COSINE[precision] for precision in ("fp32", "fp16", "int8", "fp8", "int4")]
    assert ordered == sorted(ordered, reverse=True)


@pytest.mark.parametrize(
    ("cosine", "timing", "missed"),
    [
        (0.985, TIMES, []),
        (0.98, (10.0, 10.0, 1.0), []),
        (0.9799, TIMES, ["worst token's cosine 0.97990, at least 0.98 is wanted"]),
        (math.nan, TIMES, ["worst token's cosine nan, at least 0.98 is wanted"]),
        (0.99, (10.0, 11.0, 1.1), ["1.10 x the time of FP32 (11.00 against 10.00 ms), at most 1 x is wanted"]),
        (0.99, (10.0, math.nan, math.nan), ["nan x the time of FP32 (nan against 10.00 ms), at most 1 x is wanted"]),
        (0.99, None, []),
    ],
)
def test_a_stage_misses_on_its_worst_token_or_its_time(
    cosine: float, timing: tuple[float, float, float] | None, missed: list[str]
) -> None:
    verdict = judge_stage("encoder", "int8", with_cosine(cosine), timing, GateLimits())
    assert list(verdict.failures) == missed
    assert GateReport((verdict,), 3).failures() == [f"encoder: {line}" for line in missed]
    assert GateReport((verdict,), 3).passed == (not missed)


def test_a_limit_that_was_given_is_that_of_every_precision() -> None:
    limits = GateLimits(min_cosine=0.5)
    assert {limits.cosine(precision) for precision in PRECISIONS} == {0.5}


def test_the_task_is_judged_with_its_paired_standard_error() -> None:
    lost = judge_task(score(2), score(4), limit=1.0)
    assert not lost.passed
    assert (lost.before, lost.after, lost.drop) == (98.0, 96.0, 2.0)
    # Two of a hundred differences are 1: variance (2 - 4 / 100) / 99, error its root over 10, in points.
    assert lost.standard_error == pytest.approx(100 * math.sqrt((2 - 0.04) / 99 / 100))
    report = GateReport((), 3, lost)
    assert not report.passed
    assert report.failures() == ["task: 2.00 points lost (standard error 1.41), the limit is 1"]
    assert report.to_json()["task"]["passed"] is False
    assert judge_task(score(4), score(2), limit=0.0).passed
    assert judge_task(score(2), score(3), limit=1.0).passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_cosine": 1.5}, "--min-cosine 1.5 is no cosine"),
        ({"min_cosine": math.nan}, "--min-cosine nan is no cosine"),
        ({"max_slowdown": 0.0}, "--max-slowdown 0.0: accepted is a factor above 0"),
        ({"max_slowdown": math.nan}, "--max-slowdown nan: accepted is a factor above 0"),
        ({"task_drop": -1.0}, "--task-drop -1.0: accepted are points from 0 to 100"),
    ],
)
def test_bad_limits_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GateLimits(**options)
