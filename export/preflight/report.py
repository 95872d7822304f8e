"""What preflight found, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .corners import CornerResult
from .devices import Device
from .findings import SEVERITIES, Finding
from .memory import MemoryEstimate, shown
from .profiles import Corner

if TYPE_CHECKING:
    from rich.console import RenderableType

JSON_SCHEMA_VERSION = 1
_COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}


@dataclass(frozen=True)
class PreflightReport:
    """Findings, the corners that were run and the memory estimate of one bundle for one TensorRT version.

    A graph outside of a bundle has no profiles: no corners, and None for `memory`.
    """

    bundle: str
    tensorrt: str
    device: Device | None
    findings: tuple[Finding, ...]
    corners: tuple[CornerResult, ...]
    memory: MemoryEstimate | None

    @property
    def passed(self) -> bool:
        """Whether no error was found."""
        return not self.count("error")

    def count(self, severity: str) -> int:
        """How many findings are of this severity."""
        return sum(one.severity == severity for one in self.findings)

    def summary(self) -> str:
        """One line."""
        counts = ", ".join(f"{self.count(one)} {one}{'' if self.count(one) == 1 else 's'}" for one in SEVERITIES)
        where = "" if self.device is None else f" on {self.device.title}"
        return f"{self.bundle} for TensorRT {self.tensorrt}{where}: {counts}"

    def to_json(self) -> dict[str, Any]:
        """As JSON values: `passed`, `counts`, `findings`, `corners`, `memory` (bytes) and what it was asked for."""
        return {
            "schema_version": JSON_SCHEMA_VERSION,
            "bundle": self.bundle,
            "tensorrt": self.tensorrt,
            "device": None if self.device is None else self.device.name,
            "passed": self.passed,
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [one.to_json() for one in self.findings],
            "corners": [one.to_json() for one in self.corners],
            "memory": None if self.memory is None else self.memory.to_json(),
        }


def render(report: PreflightReport) -> RenderableType:
    """Tables for a terminal."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    if report.memory is not None:
        parts += [_corner_table(report.corners), _memory_table(report.memory)]
        parts.append(Text(_memory_line(report.memory), style="dim"))
    if report.findings:
        parts.append(finding_table(report.findings))
    verdict = "nothing found that stops a build" if report.passed else "a build would fail or give wrong numbers"
    parts.append(Text(f"{report.summary()}: {verdict}", style="green" if report.passed else "red"))
    return Group(*parts)


def finding_table(findings: Sequence[Finding], title: str = "findings") -> RenderableType:
    """Severity, stage, node, what, fix; one row for each finding."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("severity", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    for column, ratio in (("node", 2), ("what", 4), ("fix", 3)):
        table.add_column(column, overflow="fold", ratio=ratio)
    for one in findings:
        colour = _COLOURS[one.severity]
        fix = f"{one.fix} (--fix does it)" if one.fixable else one.fix
        what = f"{one.check}: {one.why}"
        cells = [f"[{colour}]{one.severity}[/]", *(escape(text) for text in (one.stage, one.node, what, fix))]
        table.add_row(*cells)
    return table


def _corner_table(corners: Sequence[CornerResult]) -> RenderableType:
    """One row per stage and profile."""
    from rich.table import Table

    table = Table(title="profiles, run at their corners with ONNX Runtime on the CPU", title_justify="left")
    for column in ("stage", "profile", "smallest", "largest that ran", "passed", "vs. row alone", "vs. PyTorch"):
        table.add_column(column, overflow="fold")
    for stage, profile in dict.fromkeys((one.stage, one.profile) for one in corners):
        own = [one for one in corners if (one.stage, one.profile) == (stage, profile)]
        ran = [one for one in own if one.status != "skipped"]
        passed = sum(one.status == "passed" for one in own)
        largest = Corner(profile, ran[-1].sizes).label() if ran else "none"
        table.add_row(
            stage,
            profile,
            Corner(profile, own[0].sizes).label(),
            largest,
            f"{passed} of {len(own)}",
            _worst([one.batched for one in own]),
            _worst([one.reference for one in own]),
        )
    return table


def _memory_table(memory: MemoryEstimate) -> RenderableType:
    from rich.table import Table

    table = Table(title="memory (estimate)", title_justify="left")
    columns = ("stage", "weights", "activations opt", "max", "in/out max", "cache max", "build")
    for column in columns:
        table.add_column(column, justify="left" if column == "stage" else "right")
    for one in memory.stages:
        kinds = ", ".join(one.weights)
        table.add_row(
            one.stage,
            f"{shown(one.weights_total)} ({kinds})",
            shown(one.activations_opt),
            shown(one.activations_max),
            shown(one.io_max),
            shown(one.cache_max) if one.cache_max else "-",
            f"{shown(one.build_least)} to {shown(one.build_most)}",
        )
    return table


def _memory_line(memory: MemoryEstimate) -> str:
    unknown = sum(one.unknown for one in memory.stages)
    have = "" if memory.usable is None else f"; the device has {shown(memory.usable)} for it"
    line = f"Together, with shared activations: {shown(memory.run_opt)} at opt, {shown(memory.run_max)} at max{have}."
    gaps = (
        f" The shapes of {unknown} values were not found; each counts as its node's largest input." if unknown else ""
    )
    return f"{line}{gaps} Method: {memory.method}."


def _worst(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.1e}" if known else "-"
