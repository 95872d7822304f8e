"""`bridgeport demo`: the main job, end to end."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import CheckFailed, OutputError

if TYPE_CHECKING:
    from ..demo import DemoReport


def demo(
    keep: Annotated[
        Path | None, typer.Option(help="Leave the bundles and the shown pictures in this directory.")
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=3, max=2000, help="Held-out pictures that accuracy is taken over.")
    ] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Export the small trained model, quantise it, run it on pictures, prove it equal to PyTorch and score it."""
    from rich.console import Console

    from ...bundle import output_errors
    from ..demo import run_demo

    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise OutputError(f"{keep} exists and is not an empty directory; name another place for --keep")
    status = Console(stderr=True)
    place = tempfile.TemporaryDirectory() if keep is None else nullcontext(str(keep))
    with place as folder, output_errors(Path(folder)), status.status("starting") as spinner:
        Path(folder).mkdir(parents=True, exist_ok=True)
        report = run_demo(Path(folder), pictures=pictures, progress=spinner.update)
    if as_json:
        typer.echo(json.dumps(_document(report, keep), indent=2))
    else:
        _print(report, keep)
    if not report.parity.passed:
        raise CheckFailed(f"parity failed at {report.parity.first_divergence}")


def _document(report: DemoReport, keep: Path | None) -> dict[str, Any]:
    return {
        "shown": [asdict(one) for one in report.shown],
        "parity": report.parity.to_dict(),
        "scores": [asdict(score) for score in report.scores],
        "bundles": None if keep is None else {name: str(path) for name, path in report.bundles.items()},
    }


def _print(report: DemoReport, keep: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..parity.table import render

    console = Console()
    pictures = Table(title="What the exported model says of pictures that it has never seen", title_justify="left")
    for column in ("picture", "prompt", "text", ""):
        pictures.add_column(column, overflow="fold")
    for one in report.shown:
        right = "[green]right[/]" if one.text == one.expected else f"[red]expected: {one.expected}[/]"
        pictures.add_row(one.picture, one.prompt or "[dim](caption)[/]", one.text, right)
    console.print(pictures)
    console.print(render(report.parity))
    scores = Table(title="Exact matches on held-out pictures", title_justify="left")
    for column in ("", "captions", "answers", "seconds", "MB on disk"):
        scores.add_column(column, justify="left" if not column else "right")
    for score in report.scores:
        scores.add_row(
            score.label,
            f"{100 * score.captions / score.pictures:.1f} % of {score.pictures}",
            f"{100 * score.answers / score.questions:.1f} % of {score.questions}",
            f"{score.seconds:.1f}",
            f"{score.megabytes:.1f}",
        )
    console.print(scores)
    console.print(
        "Bundles and pictures were thrown away; `bridgeport demo --keep DIR` leaves them."
        if keep is None
        else f"Bundles and pictures are in {keep}; try `bridgeport inspect {keep / 'fp32'}`."
    )
