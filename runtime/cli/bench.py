"""`bridgeport bench`: latency and memory of a bundle, beside its peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def bench(
    bundle: Annotated[Path, typer.Argument(help="Directory that `bridgeport export` wrote.")],
    against: Annotated[
        str,
        typer.Option(
            help="Peers measured beside it, comma-separated: torch, torch-bf16, torch-compile, other bundles."
        ),
    ] = "",
    reference: Annotated[
        Path | None,
        typer.Option(help="The checkpoint that the PyTorch peers run; random weights of its sizes without."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per pass; stop tokens are ignored.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Passes per peer, after one that warms up.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per peer; all cores by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure each stage and the whole chain: median latency, peak memory, and agreement of the outputs."""
    from rich.console import Console

    from ..bench import bench as run_bench

    status = Console(stderr=True)
    names = [name.strip() for name in against.split(",") if name.strip()]
    with status.status("starting") as spinner:
        report = run_bench(
            bundle, against=names, checkpoint=reference, new_tokens=new_tokens, rounds=rounds, threads=threads,
            progress=spinner.update,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        Console().print(report.table())
        if told := report.device_text():
            Console().print(told, highlight=False, soft_wrap=True)
