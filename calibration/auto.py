"""Mixed precision of one stage: the layers whose rounding costs most stay in float until the accuracy is kept."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError, OutputError
from ..runtime.parity.metrics import compare
from .feed import stage_inputs
from .linears import Linear
from .pareto import pareto_rows, write_pareto
from .records import TensorRange
from .search import Keep, MixedPlan, MixedPoint, search_mixed
from .sensitivity import Activations, LayerDamage, affordable_samples, rank_layers

if TYPE_CHECKING:
    from .job import StageJob

Feed = Mapping[str, NDArray[Any]]
Outputs = Mapping[str, NDArray[Any]]
Run = Callable[[Feed], Outputs]
# Part of the calibration pictures that judge sets of layers and calibrate nothing, and how many suffice for that.
_ASIDE, _MOST_ASIDE = 0.25, 8
# Calibration pictures, those included, that the set found is judged on in the end.
_MOST_JUDGED = 32
# Part of the allowed error that the search leaves to pictures that it has not seen: the worst token of more pictures is
# worse than that of few.
MARGIN = 0.25
# Layers are ranked on this many samples at most, and on half of what `affordable_samples` allows: the other half of the
# time is for the search.
_MOST_RANKED = 4
_MOST_LISTED = 12  # layers of the ranking in the record; the report has all


@dataclass(frozen=True)
class LayerTimes:
    """What quantising a layer saves: `saved_ms`, node -> milliseconds (a layer's share, where it has several nodes).

    `quantised_ms`: one run of the stage with every layer quantised. `how`: how they were found, in words.
    """

    saved_ms: Mapping[str, float]
    quantised_ms: float
    how: str


@dataclass(frozen=True)
class FloatLayers:
    """What the search decided. `keep`: nodes that stay in float -> why. `details`: for the stage's record."""

    keep: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidates:
    """The float `graph` whose layers `linears` can be quantised, as `rank_layers` takes them."""

    graph: Path
    linears: Sequence[Linear]
    ranges: Mapping[str, TensorRange]
    activations: Activations = "static"
    bits: int = 8
    fp8: bool = False


def hold_aside(job: StageJob) -> tuple[StageJob, tuple[Feed, ...]]:
    """(the job without some of its pictures and with a margin on its cosine, the stage's inputs for those pictures).

    The job as it is and nothing, where mixed precision was not asked for. Raises CalibrationError when the pictures
    never call the stage, OutputError when the report cannot be written.
    """
    if not job.options.auto:
        return job, ()
    if job.options.report is not None:
        _make_folder(job.options.report / job.name)
    seen, aside = job.data.split(min(max(1, round(job.data.pictures * _ASIDE)), _MOST_ASIDE))
    feeds = tuple(itertools.islice(stage_inputs(job.source, aside, job.name), _MOST_ASIDE))
    if not feeds:
        raise CalibrationError(
            f"{job.data.name}: none of the {aside.pictures} pictures that judge mixed precision calls the stage "
            f"{job.name}; add pictures that do, or leave out --auto"
        )
    return replace(job, data=seen, min_cosine=job.min_cosine + MARGIN * (1.0 - job.min_cosine)), feeds


class Judge:
    """Worst token over all outputs of a graph, held against `reference` on calibration pictures.

    `aside`: few feeds, on which `reference` runs once. `job`: whose other pictures follow for a closer look.
    """

    def __init__(self, job: StageJob, reference: Run, aside: Sequence[Feed]) -> None:
        self._job, self._reference, self._aside = job, reference, tuple(aside)
        self._expected = [{name: np.array(value) for name, value in reference(feed).items()} for feed in aside]

    def few(self, candidate: Run) -> float:
        """The cosine on the pictures that were held aside."""
        pairs = zip(self._aside, self._expected, strict=True)
        return min(_worst(expected, candidate(feed)) for feed, expected in pairs)

    def many(self, candidate: Run) -> float:
        """The cosine on those, and on pictures that calibrated: the more tokens, the worse the worst."""
        others = itertools.islice(all_feeds(self._job, self._aside), len(self._aside), None)
        return min(self.few(candidate), *(_worst(self._reference(feed), candidate(feed)) for feed in others))


def all_feeds(job: StageJob, aside: Sequence[Feed]) -> Iterator[Feed]:
    """`aside`, then feeds of the other calibration pictures, up to the number that a closer look takes."""
    return itertools.islice(itertools.chain(aside, job.feeds()), _MOST_JUDGED)


def _worst(expected: Outputs, actual: Outputs) -> float:
    return min(compare(value, actual[name]).min_token_cosine for name, value in expected.items())


def choose_float_layers(
    job: StageJob,
    candidates: Candidates,
    times: Callable[[Sequence[LayerDamage]], LayerTimes],
    evaluate: Callable[[Keep], float],
    verify: Callable[[Keep], float],
) -> FloatLayers:
    """Rank the layers, search the set with the least latency that keeps `job.min_cosine`, and report on it.

    `job`: that of `hold_aside`. `times`: from the ranked layers to what each saves. `evaluate`: nodes that stay in
    float -> worst token's cosine on the pictures held aside; `verify`: likewise on more pictures. Where no set keeps
    the cosine nothing stays in float, and the gate refuses. The same measurements give the same layers.
    """
    layers = len({one.input for one in candidates.linears})
    samples = max(1, min(affordable_samples(job.data.pictures, layers) // 2, _MOST_RANKED))
    damages = rank_layers(
        candidates.graph,
        itertools.islice(job.feeds(), samples),
        candidates.ranges,
        linears=candidates.linears,
        activations=candidates.activations,
        bits=candidates.bits,
        fp8=candidates.fp8,
        progress=lambda done, total: job.say(f"{job.name}: ranking layers, {done} of {total}"),
    )
    job.say(f"{job.name}: what each layer saves")
    found = times(damages)
    plan = search_mixed(
        damages,
        found.saved_ms,
        _told(job, evaluate),
        min_cosine=job.min_cosine,
        quantised_ms=found.quantised_ms,
        verify=_told(job, verify),
    )
    plan = _without_first_looks(plan)
    if job.options.report is not None:
        _write_report(job.options.report / job.name, job.name, plan, damages, found)
    keep = {} if plan.chosen is None else _reasons(plan.chosen, damages, found)
    return FloatLayers(keep, _details(plan, damages, found, samples))


def _without_first_looks(plan: MixedPlan) -> MixedPlan:
    """The plan without the points that were judged on more pictures later."""
    verified = {one.keep for one in plan.points if one.verified}
    return replace(plan, points=tuple(one for one in plan.points if one.verified or one.keep not in verified))


def _told(job: StageJob, evaluate: Callable[[Keep], float]) -> Callable[[Keep], float]:
    def told(keep: Keep) -> float:
        cosine = evaluate(keep)
        job.say(f"{job.name}: {len(keep)} products in float: worst token's cosine {cosine:.5f}")
        return cosine

    return told


def _reasons(chosen: MixedPoint, damages: Sequence[LayerDamage], times: LayerTimes) -> dict[str, str]:
    reasons = {}
    for one in sorted(damages, key=lambda damage: damage.index):
        slower = sum(times.saved_ms[node] for node in one.nodes) <= 0
        why = "not faster in low precision" if slower else f"sensitivity: cosine loss {one.cosine_loss:.2g} alone"
        reasons.update({node: why for node in one.nodes if node in chosen.keep})
    return reasons


def _details(
    plan: MixedPlan, damages: Sequence[LayerDamage], times: LayerTimes, samples: int
) -> dict[str, dict[str, Any]]:
    """Plain data: the ranking's head and the table of the search."""
    auto = {
        "min_cosine": plan.min_cosine,
        "found": plan.chosen is not None,
        "layers": len(damages),
        "in_float": 0 if plan.chosen is None else plan.chosen.layers,
        "ranked_on": samples,
        "latency": times.how,
        "ranking": [[one.layer, float(f"{one.cosine_loss:.3g}")] for one in damages[:_MOST_LISTED]],
        "pareto": [list(row) for row in pareto_rows(plan)],
    }
    return {"auto": auto}


def _write_report(folder: Path, stage: str, plan: MixedPlan, damages: Sequence[LayerDamage], times: LayerTimes) -> None:
    """``pareto.png``, ``pareto.csv`` and ``sensitivity.csv``."""
    kept = frozenset() if plan.chosen is None else frozenset(plan.chosen.keep)
    header = ("layer", "products", "cosine loss alone", "relative MSE alone", "ms saved", "in float")
    rows = [
        (
            one.layer,
            " ".join(one.nodes),
            f"{one.cosine_loss:.3e}",
            f"{one.relative_mse:.3e}",
            f"{sum(times.saved_ms[node] for node in one.nodes):.4f}",
            "yes" if kept.issuperset(one.nodes) else "",
        )
        for one in damages
    ]
    try:
        write_pareto(plan, folder, stage=stage)
        with (folder / "sensitivity.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    except OSError as error:
        raise _unwritable(folder, error) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"--report: {folder} cannot be written ({error.strerror}); choose another directory")
