"""Mixed precision: which layers stay in floating point so that the accuracy holds and the least time is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import CalibrationError, InputError
from .sensitivity import LayerDamage

Keep = frozenset[str]
_REFINE = 8  # layers of the found set that are tried quantised after all


@dataclass(frozen=True)
class MixedPoint:
    """One precision of the stage that was tried.

    `keep`: nodes that stay in floating point, in the order of the graph. `layers`: how many layers that are. `cosine`:
    worst token's. `latency_ms`: of one run. `verified`: judged by `verify` and not by `evaluate`.
    """

    keep: tuple[str, ...]
    layers: int
    cosine: float
    latency_ms: float
    verified: bool = False


@dataclass(frozen=True)
class MixedPlan:
    """What the search found: `chosen`, None when no set keeps `min_cosine`, and all points in the order of trial.

    `order`: module paths in the order in which they would be taken back to floating point.
    """

    chosen: MixedPoint | None
    points: tuple[MixedPoint, ...]
    min_cosine: float
    order: tuple[str, ...]


def search_mixed(
    damages: Sequence[LayerDamage],
    saved_ms: Mapping[str, float],
    evaluate: Callable[[Keep], float],
    *,
    min_cosine: float,
    quantised_ms: float,
    verify: Callable[[Keep], float] | None = None,
    measure: Callable[[Keep], float] | None = None,
    refine: int = _REFINE,
) -> MixedPlan:
    """The set of layers with the least latency whose accuracy is at least `min_cosine`.

    Layers are ordered by damage for each millisecond that quantising them saves. Layers that save nothing stay in
    floating point; of the others the shortest head of the order that keeps the accuracy is bisected, then some of its
    layers are tried quantised after all, those first that should fit into the accuracy that is left and save most.
    About log2(layers) + `refine` evaluations. The same measurements give the same plan; ties go by the order of the
    graph.

    `damages`: of `rank_layers`. `saved_ms`: node -> its time in floating point minus its time quantised. `evaluate`:
    nodes that stay in floating point -> worst token's cosine of the graph so quantised, on pictures that calibration
    did not see. `quantised_ms`: latency with everything quantised; that of a point is this plus what its kept nodes
    would save, unless `measure` times it. `verify`: judges the final set (on more pictures, say); while it fails, the
    next layers of the order are kept too.

    Raises InputError for a node without time, CalibrationError for no layers.
    """
    if not damages:
        raise CalibrationError("there are no layers to search; rank_layers gives them")
    missing = [node for one in damages for node in one.nodes if node not in saved_ms]
    if missing:
        raise InputError(f"saved_ms has no time for node {missing[0]!r}; measure every layer, or rank only those")
    search = _Search(damages, saved_ms, evaluate, min_cosine, quantised_ms, measure)
    kept = search.shortest()
    if kept is not None:
        kept = search.refined(kept, refine)
    chosen = None if kept is None else search.point(kept)
    if kept is not None and verify is not None:
        chosen = search.verified(kept, verify)
    return MixedPlan(chosen, tuple(search.points.values()), min_cosine, tuple(one.layer for one in search.order))


class _Search:
    """Points tried so far, and the steps of the search. A layer is named by its index in the graph."""

    def __init__(
        self,
        damages: Sequence[LayerDamage],
        saved_ms: Mapping[str, float],
        evaluate: Callable[[Keep], float],
        min_cosine: float,
        quantised_ms: float,
        measure: Callable[[Keep], float] | None,
    ) -> None:
        self._layers = sorted(damages, key=lambda one: one.index)
        self._saved = {one.index: sum(saved_ms[node] for node in one.nodes) for one in self._layers}
        self._evaluate = evaluate
        self._min_cosine = min_cosine
        self._quantised_ms = quantised_ms
        self._measure = measure
        self._free = frozenset(index for index, saved in self._saved.items() if saved <= 0)
        worth = [one for one in self._layers if one.index not in self._free]
        self.order = sorted(worth, key=lambda one: (-one.cosine_loss / self._saved[one.index], one.index))
        self.points: dict[tuple[frozenset[int], bool], MixedPoint] = {}

    def shortest(self) -> frozenset[int] | None:
        """The shortest head of the order that keeps the accuracy; None when the whole order does not."""
        if self._keeps(self._head(0)):
            return self._head(0)
        fails, keeps = 0, len(self.order)
        if keeps == 0 or not self._keeps(self._head(keeps)):
            return None
        while keeps - fails > 1:
            middle = (fails + keeps) // 2
            if self._keeps(self._head(middle)):
                keeps = middle
            else:
                fails = middle
        return self._head(keeps)

    def refined(self, kept: frozenset[int], trials: int) -> frozenset[int]:
        """`kept` without the layers that turn out not to be needed, at most `trials` of them tried."""
        # Without its last layer the head is known to fail.
        candidates = [one for one in self.order if one.index in kept][:-1]
        for _ in range(min(trials, len(candidates))):
            slack = self.point(kept).cosine - self._min_cosine
            # Losses add up, roughly: of those that fit into what is left, the one that saves most; else the nearest.
            one = min(
                candidates, key=lambda one: (max(0.0, one.cosine_loss - slack), -self._saved[one.index], one.index)
            )
            candidates.remove(one)
            if self._keeps(kept - {one.index}):
                kept = kept - {one.index}
        return kept

    def verified(self, kept: frozenset[int], verify: Callable[[Keep], float]) -> MixedPoint | None:
        """`kept`, with more of the order while `verify` refuses it; None when it refuses the whole order."""
        step = 1
        while True:
            point = self.point(kept, verify)
            if point.cosine >= self._min_cosine:
                return point
            more = [one.index for one in self.order if one.index not in kept][:step]
            if not more:
                return None
            kept, step = kept | frozenset(more), step * 2

    def point(self, kept: frozenset[int], verify: Callable[[Keep], float] | None = None) -> MixedPoint:
        """The point with the layers `kept` in floating point, evaluated once."""
        known = self.points.get((kept, verify is not None))
        if known is not None:
            return known
        nodes = tuple(node for one in self._layers if one.index in kept for node in one.nodes)
        cosine = (verify or self._evaluate)(frozenset(nodes))
        if self._measure is not None:
            latency = self._measure(frozenset(nodes))
        else:
            # Layers timed alone while other work ran may seem to save more than all take.
            latency = max(0.0, self._quantised_ms + sum(self._saved[index] for index in sorted(kept)))
        point = MixedPoint(nodes, len(kept), float(cosine), float(latency), verify is not None)
        self.points[kept, verify is not None] = point
        return point

    def _head(self, length: int) -> frozenset[int]:
        return self._free | {one.index for one in self.order[:length]}

    def _keeps(self, kept: frozenset[int]) -> bool:
        return self.point(kept).cosine >= self._min_cosine  # NaN does not
