"""The loss curves of a run as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .trainer import History

WINDOW = 25


def smooth(values: list[float]) -> list[float]:
    """Running mean over the last :data:`WINDOW` steps."""
    return [sum(values[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW) for i in range(len(values))]


def save_curves(histories: Mapping[str, History], path: Path) -> None:
    """One panel per stage, one line per loss, logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(histories), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (stage, history) in zip(
        figure.subplots(1, len(histories), squeeze=False)[0], histories.items(), strict=True
    ):
        for name, values in history.items():
            axis.plot(smooth(values), label=name, linewidth=1.2)
        axis.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
