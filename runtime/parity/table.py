"""A parity report for the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .drill import DrillReport
    from .report import Measurement, ParityReport


# What a run was fed, and what it was held against.
FED_BY = {"isolated": "PyTorch", "same_weights": "PyTorch*", "chained": "the chain"}


def render(report: ParityReport) -> RenderableType:
    """Stages, cases, the drill's finding if there is one, and the verdict."""
    parts: list[RenderableType] = [_stages(report), *_failures(report), _cases(report)]
    if report.same_checkpoint is False:
        parts.append(Text("the bundle was made from other files than this checkpoint's", style="yellow"))
    parts += [Text(note, style="yellow") for note in report.notes]
    if report.drill is not None:
        parts.append(_drill(report.drill))
    style = "bold green" if report.passed else "bold red"
    parts.append(Text(("PASSED  " if report.passed else "FAILED  ") + report.summary(), style=style))
    return Group(*parts)


def _stages(report: ParityReport) -> Table:
    table = Table(title="Parity with PyTorch, worst case, errors over the RMS of its value", title_justify="left")
    table.add_column("stage", no_wrap=True)
    table.add_column("fed by", no_wrap=True)
    for column in ("max", "mean", "worst cosine"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for stage in report.stages:
        for way, measured in stage.runs.items():
            name = f"{stage.name} {stage.precision}" if stage.precision != "fp32" else stage.name
            table.add_row(name if way == "isolated" else "", FED_BY[way], *_figures(measured), _verdict(measured))
        table.add_section()
    return table


def _figures(measured: Measurement) -> list[RenderableType]:
    worst = measured.worst
    figures = (
        ("max_abs", number(worst.max_rel)),
        ("mean_abs", number(worst.mean_rel)),
        ("min_token_cosine", cosine(worst.min_token_cosine)),
    )
    return [Text(text, style="red" if name in measured.broken else "") for name, text in figures]


def _failures(report: ParityReport) -> list[RenderableType]:
    """What the table has no room for: a line for each run that fails, but not for what others' faults do to it."""
    lines: list[RenderableType] = []
    if any(stage.same_weights for stage in report.stages):
        lines.append(Text("* held against PyTorch with the bundle's own weights", style="dim"))
    for stage in report.stages:
        for way, measured in stage.runs.items():
            if not measured.passed and (way != "chained" or stage.name == report.first_divergence):
                worst = measured.worst
                figures = f"max abs {number(worst.max_abs)}, mean abs {number(worst.mean_abs)}"
                lines.append(Text(f"{stage.name}, {way.replace('_', ' ')}: {figures}, worst at {place(measured)}"))
        lines += [Text(f"{stage.name}: {finding.text}", style="yellow") for finding in stage.findings]
    return lines


def place(measured: Measurement) -> str:
    """Case and index of the worst value; empty where nothing differs."""
    worst = measured.worst
    if worst.max_abs == 0:
        return ""
    where = f"{measured.worst_case} {list(worst.where)}"
    return f"{where}: {worst.note}" if worst.note else where


def _verdict(measured: Measurement) -> Text:
    if measured.gate is None:
        return Text("no gate", style="dim")
    return Text("ok", style="green") if measured.passed else Text("FAILS", style="bold red")


def number(value: float) -> str:
    """An error with two digits; 0 and infinity in words that stand out."""
    if value == 0:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else "infinite"


def cosine(value: float) -> str:
    """A cosine: how far below 1 it is, when that is little."""
    gap = 1.0 - value
    if gap <= 1e-12:
        return "1"
    return f"1 - {gap:.1e}" if gap < 1e-2 else f"{value:.4f}"


def _cases(report: ParityReport) -> Table:
    table = Table(title=f"{report.ids.capitalize()} of the whole chain", title_justify="left")
    for column in ("case", "prompt", "PyTorch", "bundle", ""):
        table.add_column(column, overflow="fold")
    for case in report.cases:
        same = case.reference_ids == case.bundle_ids
        verdict = Text("equal", style="green") if same else Text("differ", style="red")
        texts = (f"{case.label}  {case.picture}", case.prompt, case.reference_text, case.bundle_text)
        table.add_row(*(escape(text) for text in texts), verdict)
    return table


def _drill(drill: DrillReport) -> RenderableType:
    lines = [Text(f"Inside {drill.stage}, {drill.compared} values compared", style="bold")]
    for name, step in (("last that agrees", drill.before), ("first that departs", drill.departure)):
        if step is not None and drill.departure is not None:
            one = step.difference
            figures = (
                f"max {number(one.max_rel)}, mean {number(one.mean_rel)}, worst cosine {cosine(one.min_token_cosine)}"
            )
            lines.append(Text(f"  {name:<18}  {step.op_type} {step.node}"))
            lines.append(Text(f"  {'':<18}  {step.module}: {figures}"))
    lines += [Text(f"  cause: {cause}", style="yellow") for cause in drill.causes]
    return Group(*lines, *([Text(f"  {drill.note}")] if drill.note else []))
