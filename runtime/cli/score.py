"""`bridgeport score`: how well pictures and texts go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ..score import Match, Scores

# What the columns of the table are called: the cosine, what is made of it, and what the probability means.
_PROBABILITIES = {"match": "match", "softmax": "of these texts", "sigmoid": "of this pair"}
_COSINES = {"match": "contrast"}


def score(
    bundle: Annotated[Path, typer.Argument(help="Directory that `bridgeport export` wrote from a scoring model.")],
    image: Annotated[list[Path], typer.Option(help="Picture file; may be given several times.")],
    text: Annotated[list[str], typer.Option(help="Text to compare with; may be given several times.")],
    match: Annotated[
        str | None,
        typer.Option(
            metavar="all|paired|none|K",
            help="Pairs that BLIP-2's matcher reads: all (the default), the first picture with the first text and so "
            "on, none, or for each picture the K texts with the highest cosine.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads per stage; all cores by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Score every picture against every text: cosine, and the probability that the model makes of it."""
    from ..score import Scorer

    with Scorer.load(bundle, device=device, threads=threads) as scorer:
        scores = scorer.score(image, text, match=_match(match))
        method, limit = scorer.contract.methods[0], scorer.contract.text.max_length
    for words, count, cut in zip(text, scores.tokens, scores.truncated, strict=True):
        if cut:
            typer.echo(
                f"text {words[:40]!r} has {count} tokens, the model reads {limit}; the rest is cut off", err=True
            )
    if as_json:
        typer.echo(json.dumps(document(image, text, scores), indent=2, ensure_ascii=False))
    else:
        _print(image, text, scores, method)
    typer.echo(", ".join(f"{stage} {ms:.0f} ms" for stage, ms in scores.timings_ms.items()), err=True)


def document(images: list[Path], texts: list[str], scores: Scores) -> dict[str, Any]:
    """Plain data: one record per pair, pictures outside, texts inside. What was not computed is null."""
    pairs = [
        {
            "image": str(image),
            "text": text,
            "cosine": _number(scores.cosine, i, t),
            "logit": _number(scores.logits, i, t),
            "probability": _number(scores.probabilities, i, t),
            "tokens": scores.tokens[t],
            "truncated": scores.truncated[t],
        }
        for i, image in enumerate(images)
        for t, text in enumerate(texts)
    ]
    return {"scores": pairs, "timings_ms": scores.timings_ms}


def _number(matrix: Any, i: int, t: int) -> float | None:
    if matrix is None:
        return None
    value = float(matrix[i, t])
    return value if value == value else None  # NaN: the matcher was not asked about this pair


def _match(text: str | None) -> Match | None:
    """ "5" as a number; whatever else it is, `Scorer.score` judges."""
    value: Any = int(text) if text is not None and text.isdecimal() and text.isascii() else text
    chosen: Match | None = value
    return chosen


def _print(images: list[Path], texts: list[str], scores: Scores, method: str) -> None:
    from rich.console import Console

    Console().print(_table(images, texts, scores, method))


def _table(images: list[Path], texts: list[str], scores: Scores, method: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("picture", overflow="fold")
    table.add_column("text", overflow="fold")
    table.add_column(_COSINES.get(method, "cosine"), justify="right", no_wrap=True)
    if scores.logits is not None:
        table.add_column("logit", justify="right", no_wrap=True)
    if scores.probabilities is not None:
        table.add_column(_PROBABILITIES[method], justify="right", no_wrap=True)
    for pair in document(images, texts, scores)["scores"]:
        cells = [escape(Path(pair["image"]).name), escape(pair["text"]), f"{pair['cosine']:.4f}"]
        if scores.logits is not None:
            cells.append(f"{pair['logit']:.3f}")
        if scores.probabilities is not None:
            cells.append("" if pair["probability"] is None else f"{pair['probability']:.1%}")
        table.add_row(*cells, end_section=pair["text"] == texts[-1])
    return table
