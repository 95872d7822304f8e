"""The reports of `bridgeport tokens` as tables and as one JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .count import ModelReport, PictureReport
from .measure import Timing

if TYPE_CHECKING:
    from rich.table import Table

    from .connectors import ConnectorReport

OVERFULL = "0 !"  # what is left of a context that the picture does not fit into


def as_json(models: Sequence[ModelReport], connectors: Sequence[ConnectorReport]) -> dict[str, Any]:
    """One document; `connectors` is empty where nothing was measured."""
    return {
        "models": [
            {
                **asdict(model),
                "pictures": [{**asdict(picture), "compression": picture.compression} for picture in model.pictures],
            }
            for model in models
        ],
        "connectors": [{**asdict(connector), "compression": connector.compression} for connector in connectors],
    }


def token_table(models: Sequence[ModelReport]) -> Table:
    """Tokens and context: a row for each model and picture size, one more for AnyRes before borders are left out."""
    table = _table("Visual tokens", "model", "picture")
    for column in ("tiles", "encoder", "connector", "fewer", "in the prompt", "context", "left"):
        table.add_column(column, justify="right", overflow="fold")
    for model in models:
        for picture in model.pictures:
            whole = picture.unpadded_from
            cells = (
                _count(picture.tiles),
                _count(picture.encoder_tokens),
                _count(picture.features),
                "-" if picture.compression is None else f"{picture.compression:.1f}x",
            )
            if whole is not None:
                left = _left(whole["left"], whole["tokens"] <= (model.context or 0))
                size = f"{picture.size}, before unpadding"
                table.add_row(model.name, size, *cells, _count(whole["tokens"]), _count(model.context), left)
                cells = ("", "", "", "")
            left = _left(picture.left, picture.fits)
            table.add_row(model.name, picture.size, *cells, _prompt(picture), _count(model.context), left)
    return table


def cost_table(models: Sequence[ModelReport]) -> Table:
    """Parameters in millions, and billions of FLOPs for a picture."""
    table = _table("Cost", "model", "connector")
    for column in ("encoder M", "connector M", "language M"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("picture", overflow="fold")
    for column in ("encoder GFLOPs", "connector GFLOPs"):
        table.add_column(column, justify="right", overflow="fold")
    for model in models:
        parts = [_millions(model.parameters.get(part)) for part in ("encoder", "connector", "language_model")]
        for picture in model.pictures:
            flops = [_billions(picture.flops.get(stage)) for stage in ("encoder", "connector")]
            table.add_row(model.name, model.connector or "-", *parts, picture.size, *flops)
    return table


def latency_table(models: Sequence[ModelReport]) -> Table:
    """Milliseconds of encoder and connector."""
    table = _table("Time on this machine, ms, median", "model", "picture")
    for column in ("encoder", "connector"):
        table.add_column(column, justify="right", overflow="fold")
    for column in ("by", "calls"):
        table.add_column(column, overflow="fold")
    for model in models:
        for picture in model.pictures:
            timings = [picture.latency.get(stage) for stage in ("encoder", "connector")]
            ran = [timing for timing in timings if timing is not None]
            engines = ", ".join(dict.fromkeys(timing.engine for timing in ran)) or "-"
            calls = ", ".join(str(timing.rounds) for timing in ran) or "-"
            cells = ["too large for the free memory" if timing is None else _ms(timing) for timing in timings]
            table.add_row(model.name, picture.size, *cells, engines, calls)
    return table


def connector_table(connectors: Sequence[ConnectorReport]) -> Table:
    """Connectors side by side on the same tokens, one picture."""
    width = connectors[0].output_width
    table = _table(f"Connectors side by side, to width {width}, one picture, random weights", "encoder gives", "")
    engines = list(dict.fromkeys(engine for connector in connectors for engine in connector.latency))
    for column in ("gives", "fewer", "parameters M", "GFLOPs", *(f"{engine} ms (best)" for engine in engines)):
        table.add_column(column, justify="right", overflow="fold")
    for connector in connectors:
        table.add_row(
            f"{connector.tokens} x {connector.width}",
            connector.connector,
            _count(connector.features),
            f"{connector.compression:.1f}x",
            _millions(connector.parameters),
            _billions(connector.flops),
            *(f"{_ms(timing)} ({timing.best_ms:,.1f})" for timing in (connector.latency[engine] for engine in engines)),
        )
    return table


def overfull(models: Sequence[ModelReport]) -> list[str]:
    """A sentence for every picture that the context is too small for."""
    return [
        f"{model.name}: a picture of {picture.size} takes {picture.tokens + (picture.marks or 0)} tokens, more than "
        f"the context of {model.context}; use a smaller picture or another model"
        for model in models
        for picture in model.pictures
        if picture.fits is False
    ]


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _prompt(picture: PictureReport) -> str:
    """The image tokens, and those of the texts around them where they are known."""
    return f"{picture.tokens:,}" + (f" + {picture.marks}" if picture.marks else "")


def _left(left: int | None, fits: bool | None) -> str:
    return OVERFULL if fits is False else _count(left)


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _millions(number: int | None) -> str:
    return "-" if number is None else _decimal(number / 1e6)


def _billions(number: int | None) -> str:
    return "-" if number is None else _decimal(number / 1e9)


def _decimal(number: float) -> str:
    """One place behind the point, or two digits of what would show as 0."""
    return f"{number:,.1f}" if number >= 0.05 or not number else f"{number:.2g}"


def _ms(timing: Timing) -> str:
    return f"{timing.ms:,.1f}"
