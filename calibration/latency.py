"""How much slower or faster a bundle is than the one that it was made from: both run side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

# One pass throws away what the first run of a graph allocates; medians over these rounds are then told apart from
# noise of about a tenth.
WARM_UP, ROUNDS = 1, 5
# A thread pool that still spins would be timed as part of the next pass.
SETTLE_SECONDS = 0.05

Timed = Callable[[], Mapping[str, float]]


def slowdown(before: Timed, after: Timed, *, rounds: int = ROUNDS) -> dict[str, tuple[float, float, float]]:
    """Stage -> (milliseconds before, after, and the median of after / before within a round).

    ``before`` and ``after`` run one pass and return milliseconds per stage. They take turns, each round in the other
    order, so that a slow minute of the machine and a warm cache fall on both.
    """
    passes: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
    for number in range(WARM_UP + rounds):
        first, second = (before, after) if number % 2 == 0 else (after, before)
        times = [_settled(first), _settled(second)]
        passes.append((times[0], times[1]) if number % 2 == 0 else (times[1], times[0]))
    kept = passes[WARM_UP:]
    found = {}
    for stage in kept[0][0]:
        pairs = [(one[stage], two[stage]) for one, two in kept if stage in two]
        if pairs and min(one for one, _ in pairs) > 0:
            found[stage] = (
                median(one for one, _ in pairs),
                median(two for _, two in pairs),
                median(two / one for one, two in pairs),
            )
    return found


def _settled(timed: Timed) -> Mapping[str, float]:
    time.sleep(SETTLE_SECONDS)
    return timed()
