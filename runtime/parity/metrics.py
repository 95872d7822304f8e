"""How far a value is from PyTorch's, and how far it may be.

A mean hides one broken token among hundreds (a swapped query, a cut row), a maximum hides a drift of all of
them, and both hide a direction that turned in a token of small norm: so each has its own gate. Errors are
measured against the RMS of PyTorch's value, because a single outlier channel, which trained ViTs have, would
stretch a maximum. `docs/parity.md` has the error floors and the planted faults that the numbers in `GATES`
stand between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Precision = Literal["fp32", "fp16", "int8", "int4"]

# What FP32 arithmetic leaves of a value that should be 0. A token whose norm is below it on both sides is
# noise and has no direction; an error below it is none.
ABSOLUTE_FLOOR = 1e-6


@dataclass(frozen=True)
class Difference:
    """One value of the bundle against PyTorch's.

    A *token* is one slice along the last axis: a patch, a query, a position of the prompt, a row of the
    picture. `scale` is the RMS of PyTorch's value, `max_rel` and `mean_rel` are `max_abs` and `mean_abs` over
    it. `where` is the index of `max_abs`, `worst_token` that of `min_token_cosine`. NaN and infinity count as
    infinitely wrong; so do values of another shape, which `note` then names.
    """

    max_abs: float
    mean_abs: float
    max_rel: float
    mean_rel: float
    min_token_cosine: float
    scale: float
    where: tuple[int, ...] = ()
    worst_token: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; an infinite error is None, which JSON has and infinity it has not."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: _finite(value) for name, value in fields.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value


def compare(reference: NDArray[Any], actual: NDArray[Any]) -> Difference:
    """Compare `actual` with PyTorch's `reference`, any equal shapes `[..., D]`; computed in float64."""
    if reference.shape != actual.shape:
        return unreached(f"shape is {list(actual.shape)}, PyTorch has {list(reference.shape)}", reference.shape)
    if reference.size == 0:
        return Difference(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, shape=reference.shape)
    expected = np.asarray(reference, dtype=np.float64)
    value = np.asarray(actual, dtype=np.float64)
    if not np.isfinite(value).all():
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
        return unreached(f"{value[bad]} at {list(bad)}", reference.shape, bad)
    error = np.abs(value - expected)
    scale = max(float(np.sqrt(np.mean(expected**2))), ABSOLUTE_FLOOR)
    where = np.unravel_index(int(error.argmax()), error.shape)
    cosines = token_cosines(expected, value)
    worst = np.unravel_index(int(cosines.argmin()), cosines.shape)
    max_abs, mean_abs = float(error[where]), float(error.mean())
    return Difference(
        max_abs=max_abs,
        mean_abs=mean_abs,
        max_rel=max_abs / scale,
        mean_rel=mean_abs / scale,
        min_token_cosine=float(cosines[worst]),
        scale=scale,
        where=tuple(int(i) for i in where),
        worst_token=tuple(int(i) for i in worst),
        shape=reference.shape,
    )


def unreached(note: str, shape: tuple[int, ...] = (), where: tuple[int, ...] = ()) -> Difference:
    """A value that cannot be compared, for the reason in `note`: infinitely wrong, cosine -1."""
    inf = math.inf
    return Difference(inf, inf, inf, inf, -1.0, 0.0, where, where[:-1], shape, note)


def token_cosines(reference: NDArray[np.float64], actual: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine of every slice along the last axis: `[..., D]` twice to `[...]`.

    1 where both slices are nothing but noise, 0 where only one of them is.
    """
    floor = ABSOLUTE_FLOOR * math.sqrt(reference.shape[-1])
    norms = np.linalg.norm(reference, axis=-1), np.linalg.norm(actual, axis=-1)
    empty = norms[0] <= floor, norms[1] <= floor
    safe = np.maximum(norms[0], floor) * np.maximum(norms[1], floor)
    cosines = np.clip((reference * actual).sum(axis=-1) / safe, -1.0, 1.0)
    cosines = np.where(empty[0] ^ empty[1], 0.0, cosines)
    same = (empty[0] & empty[1]) | (reference == actual).all(axis=-1)
    return np.asarray(np.where(same, 1.0, cosines))


def compare_ids(reference: Sequence[int], actual: Sequence[int]) -> Difference:
    """Compare token ids as one-hot vectors, so that the figures mean the same as elsewhere.

    `max_abs` is 0 or 1, `mean_abs` the share of positions that differ, `min_token_cosine` 1 or 0. Ids that
    one side has and the other has not differ.
    """
    length = max(len(reference), len(actual))
    wrong = [i for i in range(length) if list(reference[i : i + 1]) != list(actual[i : i + 1])]
    share = len(wrong) / length if length else 0.0
    worst = float(bool(wrong))
    note = ""
    if wrong:
        first = wrong[0]
        came, expected = (str(ids[first]) if first < len(ids) else "nothing" for ids in (actual, reference))
        note = f"{len(wrong)} of {length} differ, first at {first}: {came}, PyTorch has {expected}"
    where = tuple(wrong[:1])
    return Difference(worst, share, worst, share, 1.0 - worst, 1.0, where, where, (length,), note)


def worst_of(differences: Sequence[Difference]) -> Difference:
    """The largest error, the largest mean and the smallest cosine of several comparisons of the same kind of
    value.

    `where`, `scale`, `shape` and `note` are those of the comparison with the largest `max_rel`.
    """
    largest = max(differences, key=lambda one: (one.max_rel, one.mean_rel))
    turned = min(differences, key=lambda one: one.min_token_cosine)
    return Difference(
        max_abs=max(one.max_abs for one in differences),
        mean_abs=max(one.mean_abs for one in differences),
        max_rel=largest.max_rel,
        mean_rel=max(one.mean_rel for one in differences),
        min_token_cosine=turned.min_token_cosine,
        scale=largest.scale,
        where=largest.where,
        worst_token=turned.worst_token,
        shape=largest.shape,
        note=largest.note or next((one.note for one in differences if one.note), ""),
    )


@dataclass(frozen=True)
class Gate:
    """Bounds that a difference must keep; all three, because each sees what the others hide.

    `max_abs` and `mean_abs` bound errors relative to the RMS of PyTorch's value, plus `ABSOLUTE_FLOOR`.
    """

    max_abs: float
    mean_abs: float
    min_token_cosine: float

    def broken(self, difference: Difference) -> tuple[str, ...]:
        """Names of the bounds that `difference` breaks; empty when it passes. NaN breaks every bound."""
        scale = difference.scale
        kept = {
            "max_abs": difference.max_abs <= self.max_abs * scale + ABSOLUTE_FLOOR,
            "mean_abs": difference.mean_abs <= self.mean_abs * scale + ABSOLUTE_FLOOR,
            "min_token_cosine": difference.min_token_cosine >= self.min_token_cosine,
        }
        return tuple(name for name, ok in kept.items() if not ok)

    def to_dict(self) -> dict[str, float]:
        """Plain data for JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
