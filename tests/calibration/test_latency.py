"""Timing two things side by side."""

from __future__ import annotations

import pytest

from bridgeport.calibration import latency
from bridgeport.calibration.latency import slowdown


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(latency, "SECONDS", 0.0)


def test_a_slow_minute_falls_on_both() -> None:
    """The machine is ten times slower from the third round to the fifth: one after the other, one side would pay."""
    calls: list[str] = []

    def timed(name: str, milliseconds: float) -> dict[str, float]:
        calls.append(name)
        slow = 10.0 if 4 <= len(calls) - 1 < 10 else 1.0
        return {"encoder": milliseconds * slow}

    found = slowdown(lambda: timed("before", 10.0), lambda: timed("after", 5.0))
    assert found["encoder"] == (10.0, 5.0, 0.5)
    # Each round begins with the other one, so that a warm cache falls on both.
    assert calls[:6] == ["before", "after", "after", "before", "before", "after"]


def test_the_first_round_is_thrown_away() -> None:
    times = iter([0.001, *[2.0] * 20])
    assert slowdown(lambda: {"llm": next(times)}, lambda: {"llm": 4.0})["llm"] == (2.0, 4.0, 2.0)


def test_short_stages_are_timed_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 1000.0)
    calls: list[int] = []

    def timed() -> dict[str, float]:
        calls.append(1)
        return {"llm": 1.0}

    slowdown(timed, lambda: {"llm": 1.0})
    assert len(calls) == latency.WARM_UP + latency.MOST_ROUNDS


def test_a_stage_that_one_side_has_not_or_that_takes_no_time_is_left_out() -> None:
    found = slowdown(lambda: {"encoder": 1.0, "text": 1.0, "none": 0.0}, lambda: {"encoder": 1.0, "none": 1.0})
    assert list(found) == ["encoder"]
