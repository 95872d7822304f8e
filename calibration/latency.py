"""How much slower or faster a bundle is than the one that it was made from: both run side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

# One pass throws away what the first run of a graph allocates.
WARM_UP = 1
# At least so many rounds, and more for stages of a few milliseconds, until so many seconds have gone by.
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 5, 25, 3.0
# A thread pool that still spins would be timed as part of the next pass.
SETTLE_SECONDS = 0.05

Timed = Callable[[], Mapping[str, float]]


def slowdown(before: Timed, after: Timed) -> dict[str, tuple[float, float, float]]:
    """Stage -> (least milliseconds before, least after, after / before).

    ``before`` and ``after`` run one pass and return milliseconds per stage. They take turns, each round in the other
    order. The least of the rounds counts and not their median: whatever else the machine does only ever adds time, to
    a stage of three milliseconds ten times its own.
    """
    passes: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
    started = time.perf_counter()
    while len(passes) < WARM_UP + LEAST_ROUNDS or (
        len(passes) < WARM_UP + MOST_ROUNDS and time.perf_counter() - started < SECONDS
    ):
        turned = len(passes) % 2 == 1
        first, second = (after, before) if turned else (before, after)
        times = _settled(first), _settled(second)
        passes.append((times[1], times[0]) if turned else times)
    kept = passes[WARM_UP:]
    found = {}
    for stage in kept[0][0].keys() & kept[0][1].keys():
        one, two = (min(times[side][stage] for times in kept) for side in (0, 1))
        if one > 0:
            found[stage] = (one, two, two / one)
    return found


def _settled(timed: Timed) -> Mapping[str, float]:
    time.sleep(SETTLE_SECONDS)
    return timed()
