"""`bridgeport preflight`: what would stop or hurt a TensorRT build, found without a GPU and without TensorRT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..preflight.fix import FixReport
    from ..preflight.report import PreflightReport


def preflight(
    bundle: Annotated[
        Path, typer.Argument(help="Directory that `bridgeport export` or `quantize` wrote; or any .onnx file.")
    ],
    tensorrt: Annotated[
        str, typer.Option("--tensorrt", help="Version that will build: 10.3 (JetPack 6.2), 10.13, 10.16, 11.4.")
    ] = "10.3",
    device: Annotated[
        str | None,
        typer.Option("--device", help="Where it will run: orin-nano, orin-nx, agx-orin, thor, l4, h200, ..."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="Checkpoint directory; the corners of the profiles are held against PyTorch."),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile", help="As for build: 'batch=1,4,8 sequence=1,64,128' (MIN,OPT,MAX); else the contract's."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, help="For the corners of one stage; what takes longer is left out.")
    ] = 60.0,
    fix: Annotated[bool, typer.Option("--fix", help="Write a bundle in which is repaired what can be.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The repaired bundle, with --fix.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of ONNX Runtime; all cores else.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find what would stop or hurt a TensorRT build, without a GPU; exit 1 when there is an error."""
    from rich.console import Console

    from ...errors import InputError
    from ..preflight.corners import Limits
    from ..preflight.run import default_memory, preflight_graph
    from ..preflight.run import preflight as check

    if bundle.suffix == ".onnx" and bundle.is_file():
        given = {"--fix": fix, "-o": output, "--reference": reference, "--profile": profile}
        if names := [name for name, value in given.items() if value]:
            raise InputError(
                f"{bundle} is one graph, without a contract: leave {', '.join(names)} out, or give the bundle that it "
                "belongs to"
            )
        _tell(preflight_graph(bundle, tensorrt=tensorrt, device=device), None, as_json=as_json)
        return
    if fix != (output is not None):
        raise InputError("--fix and -o OUT go together: name the repaired bundle, the given one is never changed")
    options: dict[str, Any] = {
        "tensorrt": tensorrt,
        "device": device,
        "reference": reference,
        "profiles": profile or (),
        "limits": Limits(default_memory(), seconds),
        "threads": threads,
    }
    fixed: FixReport | None = None
    with Console(stderr=True).status("verifying the bundle") as spinner:
        options["progress"] = spinner.update
        if output is not None:
            from ..preflight.fix import fix_bundle

            fixed = fix_bundle(bundle, output, force=force, **options)
        report = check(bundle, **options) if fixed is None else fixed.after
    _tell(report, fixed, as_json=as_json)


def _tell(report: PreflightReport, fixed: FixReport | None, *, as_json: bool) -> None:
    """Print what was found, and CheckFailed for errors."""
    from rich.console import Console

    from ...errors import CheckFailed
    from ..preflight.report import render

    if as_json:
        typer.echo(json.dumps((fixed or report).to_json(), indent=2))
    else:
        console = Console()
        if fixed is not None:
            _print_repairs(console, fixed)
        console.print(render(report))
    if not report.passed:
        raise CheckFailed(report.summary())


def _print_repairs(console: Any, fixed: FixReport) -> None:
    from rich.markup import escape

    from ..preflight.report import finding_table

    for one in fixed.repairs:
        equal = "" if one.max_rel is None else f", equal to {one.max_rel:.1e} of the RMS"
        note = f": {one.note}" if one.note else equal
        console.print(f"{one.status} {escape(one.stage)}: {escape(one.what)}{escape(note)}")
    if not fixed.repairs:
        console.print("nothing that was found can be repaired here; the bundle was copied")
    if fixed.solved():
        console.print(finding_table(fixed.solved(), "solved"))
