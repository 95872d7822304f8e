"""Accuracy against latency of the points that a search tried: a picture and tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DependencyError
from .search import MixedPlan, MixedPoint

_HEADER = ("layers in float", "latency ms", "worst-token cosine", "best for its time", "chosen")
_FLOOR = 1e-7  # what the logarithmic axis shows of a loss of 0
_BLUE, _GREY, _RED, _INK = "#2563a8", "#9aa1a9", "#c2410c", "#24292f"


def pareto_front(points: Sequence[MixedPoint]) -> tuple[MixedPoint, ...]:
    """The points that no other beats in both latency and cosine, the fastest first."""
    front: list[MixedPoint] = []
    for point in sorted(points, key=lambda one: (one.latency_ms, -one.cosine, one.layers)):
        if not front or point.cosine > front[-1].cosine:
            front.append(point)
    return tuple(front)


def pareto_rows(plan: MixedPlan) -> list[tuple[str, ...]]:
    """One row per point, the fastest first, below a header."""
    front = pareto_front(plan.points)
    rows: list[tuple[str, ...]] = [_HEADER]
    for point in sorted(plan.points, key=lambda one: (one.latency_ms, one.layers, one.verified)):
        marks = ("yes" if point in front else "", "yes" if point == plan.chosen else "")
        rows.append((str(point.layers), _milliseconds(point.latency_ms), f"{point.cosine:.6f}", *marks))
    return rows


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def pareto_markdown(plan: MixedPlan) -> str:
    """`pareto_rows` as a Markdown table."""
    header, *rows = pareto_rows(plan)
    lines = [header, ("---:", "---:", "---:", ":---:", ":---:"), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_pareto(plan: MixedPlan, folder: Path, *, stage: str, stem: str = "pareto") -> tuple[Path, Path]:
    """Write ``<stem>.png`` and ``<stem>.csv`` into `folder`; returns both paths.

    Raises DependencyError without matplotlib, OSError when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture, table = folder / f"{stem}.png", folder / f"{stem}.csv"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(pareto_rows(plan))
    table.write_text(text.getvalue(), encoding="utf-8")
    _figure(plan, stage).savefig(picture, metadata={"Software": None})
    return picture, table


def _figure(plan: MixedPlan, stage: str) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError(
            f"the picture of the search needs matplotlib ({error}); install it with `pip install 'bridgeport[export]'`"
        ) from error
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    front = pareto_front(plan.points)
    _draw_points(axes, plan, front)
    axes.axhline(max(1 - plan.min_cosine, _FLOOR), color=_RED, linewidth=1, linestyle="--")
    axes.annotate(
        f"budget: cosine {plan.min_cosine:g}",
        (1, max(1 - plan.min_cosine, _FLOOR)),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=_RED,
        fontsize=9,
    )
    axes.set_yscale("log")
    axes.invert_yaxis()  # better is up
    axes.margins(0.1, 0.15)
    axes.grid(visible=True, which="major", color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("latency, ms")
    axes.set_ylabel("1 \N{MINUS SIGN} worst-token cosine")
    axes.set_title(f"{stage}: accuracy against latency, numbers are layers in float", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def _draw_points(axes: Any, plan: MixedPlan, front: Sequence[MixedPoint]) -> None:
    def at(points: Sequence[MixedPoint]) -> tuple[list[float], list[float]]:
        return [one.latency_ms for one in points], [_loss(one) for one in points]

    others = [one for one in plan.points if one not in front]
    axes.plot(*at(front), color=_BLUE, linewidth=1.2, marker="o", markersize=5, label="best for its time")
    if others:
        axes.plot(*at(others), color=_GREY, linestyle="", marker="o", markersize=5, label="beaten")
    if plan.chosen is not None:
        chosen = at([plan.chosen])
        axes.plot(*chosen, color=_INK, linestyle="", marker="o", markersize=12, fillstyle="none", label="chosen")
    for point in _labelled(plan, front):
        place = (point.latency_ms, _loss(point))
        axes.annotate(str(point.layers), place, xytext=(7, 7), textcoords="offset points", fontsize=8, color=_INK)


def _labelled(plan: MixedPlan, front: Sequence[MixedPoint]) -> list[MixedPoint]:
    """The chosen point and those of the front that stand clear of it and of each other."""
    first, last = front[0].latency_ms, front[-1].latency_ms
    labelled = [] if plan.chosen is None else [plan.chosen]
    for point in (front[0], front[-1], *front):
        if all(abs(point.latency_ms - one.latency_ms) > 0.04 * (last - first) for one in labelled):
            labelled.append(point)
    return labelled


def _loss(point: MixedPoint) -> float:
    loss = 1.0 - point.cosine
    return max(loss, _FLOOR) if loss == loss else 2.0  # NaN is as wrong as can be
