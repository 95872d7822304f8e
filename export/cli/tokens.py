"""`bridgeport tokens`: what a picture costs a model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..tokens import ModelReport
    from ..tokens.connectors import ConnectorReport

DEFAULT_SIZES = ("336x336", "672x672")
_WIDEST = 10_000


def tokens(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Checkpoint directories, bundles, or models known by name (llava-1.5-7b, ...: an unknown name lists "
            "them). Without any: a picture as patches, as queries and as tiles, in a context of 4096."
        ),
    ] = None,
    image_size: Annotated[
        list[str] | None,
        typer.Option(help="WIDTHxHEIGHT of a picture in pixels; may be given several times. 336x336 and 672x672."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the context, instead of the language model's own.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also time encoder and connector here, and connectors against each other."),
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Calls per measurement, after one that warms up.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Count visual tokens, what they leave of the context, and what encoder and connector cost."""
    from rich.console import Console

    from ..tokens import Size, count_tokens, open_subject
    from ..tokens.known import WELL_KNOWN, WELL_KNOWN_CONTEXT
    from ..tokens.table import as_json as document

    if not models and context is None:
        context = WELL_KNOWN_CONTEXT
    sizes = [Size.parse(size) for size in image_size or DEFAULT_SIZES]
    subjects = [open_subject(name) for name in models or WELL_KNOWN]
    status = Console(stderr=True)
    with status.status("starting") as spinner:
        reports = [
            count_tokens(
                subject, sizes, context=context, measure=measure, rounds=rounds, progress=spinner.update
            )
            for subject in subjects
        ]  # fmt: skip
        connectors = _compare(rounds, spinner.update) if measure else []
    if as_json:
        typer.echo(json.dumps(document(reports, connectors), indent=2))
    else:
        _print(Console(), reports, connectors)
    _warn(status, reports)


def _compare(rounds: int, progress: object) -> list[ConnectorReport]:
    """Connectors side by side; none where there is no torch to make them."""
    from ..tokens.subjects import has_torch

    if not has_torch():
        return []
    from ..tokens.connectors import compare_connectors

    return list(compare_connectors(rounds=rounds, progress=progress if callable(progress) else None))


def _print(console: Console, reports: list[ModelReport], connectors: list[ConnectorReport]) -> None:
    from ..tokens.table import connector_table, cost_table, latency_table, token_table

    tables = [token_table(reports)]
    if any(report.parameters for report in reports):
        tables.append(cost_table(reports))
    if any(picture.latency for report in reports for picture in report.pictures):
        tables.append(latency_table(reports))
    if connectors:
        tables.append(connector_table(connectors))
    if not console.is_terminal:
        # A file or a pipe has no width to fit into.
        unbound = console.options.update(max_width=_WIDEST)
        console.width = max(console.width, *(console.measure(table, options=unbound).maximum for table in tables))
    for table in tables:
        console.print(table)


def _warn(status: Console, reports: list[ModelReport]) -> None:
    from ..tokens.table import overfull

    for sentence in overfull(reports):
        status.print(f"bridgeport: {sentence}", markup=False, highlight=False, soft_wrap=True)
