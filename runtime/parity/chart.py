"""Errors by stage as inline SVG: three dot plots side by side, logarithmic, with each gate marked.

A filled dot is the isolated run, a ring the chained one, the upright bar the gate. Colours are CSS variables
of the page that holds the picture, so it follows its light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .metrics import Difference, Gate
    from .report import Measurement, ParityReport, StageReport

ROW, TOP, LABELS, PANEL, GAP, BOTTOM = 34, 46, 172, 250, 44, 44


@dataclass(frozen=True)
class Panel:
    """One figure: its title, how it is read off a difference and off a gate, and the bound that judges it.

    `low` and `high`: the decades shown, `step`: between two ticks. What is smaller, zero included, stands on the
    left edge; what is larger on the right one.
    """

    title: str
    value: Callable[[Difference], float]
    gate: Callable[[Gate], float]
    bound: str
    low: int = -9
    high: int = 1
    step: int = 2

    def offset(self, value: float) -> float:
        """Where `value` stands on the logarithmic axis, in pixels from the panel's left edge."""
        if not value > 0:
            return 0.0
        decade = math.log10(value) if math.isfinite(value) else self.high
        return (min(max(decade, self.low), self.high) - self.low) / (self.high - self.low) * PANEL


PANELS = (
    Panel("max abs / scale", lambda one: one.max_rel, lambda gate: gate.max_abs, "max_abs"),
    Panel("mean abs / scale", lambda one: one.mean_rel, lambda gate: gate.mean_abs, "mean_abs"),
    Panel(
        "1 \N{MINUS SIGN} worst-token cosine",
        lambda one: 1.0 - one.min_token_cosine,
        lambda gate: 1.0 - gate.min_token_cosine,
        "min_token_cosine",
        low=-13,
        step=4,
    ),
)


def chart(report: ParityReport) -> str:
    """The whole picture as one `<svg>` element."""
    width = LABELS + len(PANELS) * (PANEL + GAP)
    height = TOP + ROW * len(report.stages) + BOTTOM
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Errors by stage" '
        'xmlns="http://www.w3.org/2000/svg">'
    ]
    for row, stage in enumerate(report.stages):
        parts.append(_row(stage, row, width))
    for column, panel in enumerate(PANELS):
        left = LABELS + column * (PANEL + GAP)
        parts.append(_axes(panel, left, len(report.stages)))
        for row, stage in enumerate(report.stages):
            parts.append(_points(panel, stage, left, TOP + ROW * row + ROW / 2))
    return "".join([*parts, "</svg>"])


def _row(stage: StageReport, row: int, width: int) -> str:
    top = TOP + ROW * row
    band = f'<rect x="0" y="{top}" width="{width}" height="{ROW}" class="band"/>' if row % 2 == 0 else ""
    style = "stage" if stage.passed else "stage fails"
    place = f'x="{LABELS - 14}" y="{top + ROW / 2 + 4}" text-anchor="end"'
    return f'{band}<text {place} class="{style}">{escape(stage.name)}</text>'


def _axes(panel: Panel, left: int, rows: int) -> str:
    bottom = TOP + ROW * rows
    parts = [f'<text x="{left + PANEL / 2}" y="22" class="title" text-anchor="middle">{panel.title}</text>']
    for decade in range(panel.low, panel.high + 1, panel.step):
        x = left + panel.offset(10.0**decade)
        label = f'10<tspan dy="-5" font-size="9">{str(decade).replace("-", chr(0x2212))}</tspan>'
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" class="tick" text-anchor="middle">{label}</text>')
    return "".join(parts)


def _points(panel: Panel, stage: StageReport, left: float, y: float) -> str:
    parts = []
    shapes = {"isolated": "dot", "same_weights": "dot same", "chained": "ring"}
    step = 10 if len(stage.runs) == 2 else 7
    for index, (way, measured) in enumerate(stage.runs.items()):
        shape, height = shapes[way], y + step * (index - (len(stage.runs) - 1) / 2)
        parts.append(_gate(panel, measured, left, height))
        value = panel.value(measured.worst)
        style = f"{shape} fails" if panel.bound in measured.broken else shape
        tip = f"{stage.name}, {way.replace('_', ' ')}: {panel.title} {value:.2g}"
        parts.append(
            f'<circle cx="{left + panel.offset(value):.1f}" cy="{height:.1f}" r="4.5" class="{style}">'
            f"<title>{escape(tip)}</title></circle>"
        )
    return "".join(parts)


def _gate(panel: Panel, measured: Measurement, left: float, y: float) -> str:
    bound = 0.0 if measured.gate is None else panel.gate(measured.gate)
    if not bound > 0:
        return ""
    x = left + panel.offset(bound)
    return (
        f'<line x1="{x:.1f}" y1="{y - 5:.1f}" x2="{x:.1f}" y2="{y + 5:.1f}" class="gate">'
        f"<title>gate {bound:.2g}</title></line>"
    )
