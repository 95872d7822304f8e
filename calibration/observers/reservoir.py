"""A bounded, even sample of the rows of a tensor."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


class RowReservoir:
    """The `size` rows with the smallest random keys of all that came: each row is kept with the same probability.

    The keys of a sample depend on the seed, the tensor's name and the sample's number alone, so that nothing of the
    generator has to survive an interruption.
    """

    def __init__(self, name: str, size: int, seed: int) -> None:
        self._entropy = (seed, zlib.crc32(name.encode()))
        self._size = size
        self._keys = np.empty(0, dtype=np.float64)
        self._rows: NDArray[np.float32] | None = None

    def add(self, rows: NDArray[np.float32], sample: int) -> None:
        """Draw from `rows` `[n, C]` of the sample numbered `sample`."""
        if self._size == 0:
            return
        if self._rows is None:
            self._rows = np.empty((self._size, rows.shape[1]), dtype=np.float32)
            self._keys = np.full(self._size, np.inf)
        keys = np.random.default_rng((*self._entropy, sample)).random(len(rows))
        # Free places have the key infinity and go first.
        candidates = np.flatnonzero(keys < self._keys.max())
        both = np.concatenate((self._keys, keys[candidates]))
        kept = np.zeros(both.size, dtype=bool)
        kept[np.argsort(both, kind="stable")[: self._size]] = True
        new = candidates[kept[self._size :]]
        places = np.flatnonzero(~kept[: self._size])
        self._rows[places] = rows[new]
        self._keys[places] = keys[new]

    def rows(self) -> NDArray[np.float32] | None:
        """`[R, C]`, R at most `size`; None when nothing was drawn."""
        if self._rows is None:
            return None
        return self._rows[np.isfinite(self._keys)]

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that `restore` takes."""
        return {} if self._rows is None else {"keys": self._keys, "rows": self._rows}

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave."""
        if "rows" in state:
            self._keys, self._rows = np.array(state["keys"]), np.array(state["rows"])
