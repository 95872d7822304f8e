"""FP8 E4M3 (finite, no infinities): 4 bits of exponent, 3 of mantissa, largest number 448."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

FP8_MAX = 448.0


def round_to_fp8(array: NDArray[np.floating[Any]]) -> NDArray[Any]:
    """`array` as float8_e4m3fn: to the nearest, ties to even, what is beyond 448 becomes 448.

    The cast of ml_dtypes makes NaN of what is too large, so the clipping comes first.
    """
    rounded: NDArray[Any] = np.clip(array, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    return rounded
