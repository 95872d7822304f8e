"""What is observed, and how."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import InputError

OBSERVERS = ("minmax", "moving-average", "percentile", "mse", "entropy")


@dataclass(frozen=True)
class ObserverSettings:
    """Options of all observers.

    `observers`: which ranges to choose, names of `OBSERVERS`. `percentile`: share of values, in percent, below the
    upper end and above the lower end of the range of "percentile". `averaging`: weight of the newest sample in
    "moving-average"; None weighs all samples the same. `symmetric`, `bits`: the quantisation that "mse" and "entropy"
    choose for. `rows`: how many rows of each tensor are kept. `seed`: draws those rows.
    """

    observers: tuple[str, ...] = OBSERVERS
    percentile: float = 99.999
    averaging: float | None = None
    symmetric: bool = True
    bits: int = 8
    rows: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.observers if name not in OBSERVERS]
        if unknown or not self.observers:
            raise InputError(f"observers are {self.observers}; accepted are one or more of {', '.join(OBSERVERS)}")
        if not 50.0 < self.percentile <= 100.0:  # NaN too
            raise InputError(f"percentile is {self.percentile}; accepted is more than 50, up to 100 (99.999 is usual)")
        if self.averaging is not None and not 0.0 < self.averaging <= 1.0:
            raise InputError(f"averaging is {self.averaging}; accepted is more than 0, up to 1, or None")
        if not 2 <= self.bits <= 8:
            raise InputError(f"bits is {self.bits}; accepted are 2 to 8")
        if self.rows < 0:
            raise InputError(f"rows is {self.rows}; accepted is 0 or more")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"observers": list(self.observers)}

    def levels(self) -> int:
        """Positive steps of symmetric quantisation: 127 at 8 bits."""
        return int(math.ldexp(1, self.bits - 1)) - 1
