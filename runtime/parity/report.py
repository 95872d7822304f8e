"""What a parity check found, as data: the JSON document, the terminal table and the HTML page all read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .metrics import Difference, Gate, worst_of

if TYPE_CHECKING:
    from .drill import DrillReport


@dataclass(frozen=True)
class Measurement:
    """One stage, run one way (isolated or chained): case label -> difference, and the gate they must all
    keep.

    A gate of None measures without judging (free-running tokens of a quantised LLM).
    """

    cases: Mapping[str, Difference]
    gate: Gate | None

    @property
    def worst(self) -> Difference:
        """The worst of every figure over the cases."""
        return worst_of(list(self.cases.values()))

    @property
    def worst_case(self) -> str:
        """Label of the case with the largest error over its scale."""
        return max(self.cases, key=lambda label: (self.cases[label].max_rel, self.cases[label].mean_rel))

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the bounds that some case breaks, in the gate's order."""
        if self.gate is None:
            return ()
        broken = {name for difference in self.cases.values() for name in self.gate.broken(difference)}
        return tuple(name for name in self.gate.__dataclass_fields__ if name in broken)

    @property
    def passed(self) -> bool:
        """Whether every case keeps the gate."""
        return not self.broken

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the worst figures, where they are, and the verdict."""
        return self.worst.to_dict() | {
            "case": self.worst_case,
            "passed": self.passed,
            "broken": list(self.broken),
            "gate": None if self.gate is None else self.gate.to_dict(),
        }


@dataclass(frozen=True)
class Finding:
    """What reading a graph showed, in one sentence about one node."""

    node: str
    text: str


@dataclass(frozen=True)
class StageReport:
    """One stage: fed PyTorch's input (`isolated`), and fed what the bundle itself computed before
    (`chained`).

    `precision` is that of the bundle's stage that computes it. `same_weights`: for a quantised stage, isolated and
    held against PyTorch with the bundle's own weights in place of the checkpoint's, so that a wrong graph does not
    pass for rounding. `findings`: what reading the graph showed, whatever it does to the numbers.
    """

    name: str
    precision: str
    isolated: Measurement
    chained: Measurement
    same_weights: Measurement | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def runs(self) -> dict[str, Measurement]:
        """The ways it was run, by name."""
        runs = {"isolated": self.isolated, "same_weights": self.same_weights, "chained": self.chained}
        return {name: run for name, run in runs.items() if run is not None}

    @property
    def passed(self) -> bool:
        """Whether it passes every way it was run, and reading the graph showed nothing."""
        return not self.findings and all(run.passed for run in self.runs.values())

    @property
    def reason(self) -> str:
        """Why it does not pass: the first way that fails and the bounds it breaks, or the first finding."""
        for name, run in self.runs.items():
            if not run.passed:
                return f"{name.replace('_', ' ')}: {', '.join(run.broken)}"
        return self.findings[0].text if self.findings else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "precision": self.precision,
            "isolated": self.isolated.to_dict(),
            "chained": self.chained.to_dict(),
            "same_weights": None if self.same_weights is None else self.same_weights.to_dict(),
            "findings": [finding.text for finding in self.findings],
            "passed": self.passed,
        }


@dataclass(frozen=True)
class CaseReport:
    """One picture with one prompt: what PyTorch says to it, and what the bundle says."""

    label: str
    picture: str
    prompt: str
    reference_text: str
    bundle_text: str
    reference_ids: tuple[int, ...]
    bundle_ids: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


@dataclass(frozen=True)
class ParityReport:
    """The whole check, stages in the order in which the chain runs them."""

    bundle: str
    checkpoint: str
    stages: tuple[StageReport, ...]
    cases: tuple[CaseReport, ...]
    # Whether the bundle says it was made from the very files of the checkpoint (None when it does not say).
    same_checkpoint: bool | None = None
    drill: DrillReport | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    # What the ids of the cases are.
    ids: str = "greedy tokens"
    # What PyTorch's side was given that transformers does not have, a sentence each.
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every stage keeps its gates."""
        return all(stage.passed for stage in self.stages)

    @property
    def first_divergence(self) -> str | None:
        """Name of the first stage that does not pass, or None."""
        return next((stage.name for stage in self.stages if not stage.passed), None)

    @property
    def tokens_match(self) -> bool:
        """Whether the chain's greedy tokens are PyTorch's, in every case."""
        return all(case.reference_ids == case.bundle_ids for case in self.cases)

    def stage(self, name: str) -> StageReport:
        """The stage called `name`; KeyError when there is none."""
        return {stage.name: stage for stage in self.stages}[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "passed": self.passed,
            "stages": [stage.to_dict() for stage in self.stages],
            "first_divergence": self.first_divergence,
            "tokens_match": self.tokens_match,
            "bundle": self.bundle,
            "checkpoint": self.checkpoint,
            "same_checkpoint": self.same_checkpoint,
            "drill": None if self.drill is None else self.drill.to_dict(),
            "cases": [case.to_dict() for case in self.cases],
            "versions": dict(self.versions),
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """One sentence: the verdict, and where it first goes wrong."""
        if self.passed:
            tokens = "equal" if self.tokens_match else "differ, as those of a quantised LLM may"
            return f"all {len(self.stages)} stages are within their gates of PyTorch, {self.ids} {tokens}"
        stage = self.stage(self.first_divergence or "")
        sentence = f"parity failed: {stage.name} is the first stage to diverge ({stage.reason})"
        if self.drill is not None and self.drill.departure is not None:
            sentence += f", at {self.drill.departure.node} ({self.drill.departure.module})"
        return sentence
