"""`bridgeport parity`: a bundle against PyTorch, stage by stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ...cli_options import TrustRemoteCode


def parity(
    bundle: Annotated[Path, typer.Argument(help="Directory that `bridgeport export` wrote.")],
    reference: Annotated[Path, typer.Option("--reference", help="Checkpoint directory that it was made from.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="Picture to compare on; may be given several times.")
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option("--video", help="Animated picture or directory of frames; may be given several times."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Prompt to compare with; may be given several times.")
    ] = None,
    drill: Annotated[
        bool,
        typer.Option("--drill", help="Find the first node that departs inside the first stage that does."),
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write the report with a picture of the errors here.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to compare.")] = 24,
    device: Annotated[str, typer.Option("--device", help="Where the bundle runs: cpu, cuda or cuda:N.")] = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Hold every stage of a bundle against PyTorch, on PyTorch's input and chained; exit 1 when one diverges."""
    from rich.console import Console

    from ...errors import CheckFailed
    from ..parity import check_parity, write_html
    from ..parity.table import render

    with Console(stderr=True).status("comparing with PyTorch"):
        report = check_parity(
            bundle,
            reference,
            images=image or None,
            prompts=prompt or None,
            videos=video or None,
            drill=drill,
            max_new_tokens=max_new_tokens,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    if html is not None:
        write_html(report, html)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        Console().print(render(report))
    if not report.passed:
        raise CheckFailed(report.summary())
