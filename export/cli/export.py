"""`bridgeport export`: a trained checkpoint to a bundle."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...cli_options import TrustRemoteCode

if TYPE_CHECKING:
    from ...bundle import Bundle


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Directory in the Hugging Face layout.")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Directory to write.")],
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, fp16, int8 (encoder and connector, INT8 weights in the language model), int4 (weights of the "
            "language model) or fp8 (tensorrt)."
        ),
    ] = "fp32",
    target: Annotated[str, typer.Option(help="What the bundle is made for: cpu, cuda or tensorrt.")] = "cpu",
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Pictures to quantise with; `bridgeport quantize` has more options."),
    ] = None,
    reduce_tokens: Annotated[
        str | None,
        typer.Option(
            "--reduce-tokens",
            metavar="METHOD:N",
            help="Fewer image tokens: pool:S averages S x S of them, tome:R merges R away, queries:K computes the "
            "first K learned queries.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a directory that exists.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickle weights too, with weights_only=True.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made and checked as JSON.")] = False,
) -> None:
    """Export a trained checkpoint to ONNX, check every graph against PyTorch, and write a bundle."""
    from rich.console import Console

    from ...models.reduction_contract import parse_reduction
    from ..options import check_libraries, check_options

    # Before the heavy imports of an export: a typing mistake or a missing library is answered at once.
    check_options(precision, target, calibration)
    if reduce_tokens is not None:
        parse_reduction(reduce_tokens)
    check_libraries()
    # Bound to this stderr: exporters print, and what they print is caught by swapping sys.stderr.
    console = Console(file=sys.stderr)
    started = time.perf_counter()
    # Nothing but an error is printed when stderr is no terminal.
    with console.status("starting") as status:
        from .. import export_checkpoint

        bundle = export_checkpoint(
            checkpoint,
            out,
            precision=precision,
            target=target,
            calibration=calibration,
            reduce_tokens=reduce_tokens,
            force=force,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            progress=status.update,
        )
    summary = summarize(bundle, time.perf_counter() - started)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        _print(summary)


def summarize(bundle: Bundle, seconds: float) -> dict[str, Any]:
    """What was made: stages with sizes, all checks, total size in bytes and time in seconds."""
    sizes = {file.path: file.size for file in bundle.manifest.files}
    return {
        "bundle": str(bundle.path),
        "model": bundle.manifest.checkpoint.architecture,
        "seconds": round(seconds, 1),
        "bytes": sum(sizes.values()),
        "stages": [
            {
                "name": stage.contract.name,
                "file": stage.file,
                "precision": stage.precision,
                "opset": stage.opset,
                "bytes": sizes[stage.file] + sizes.get(f"{stage.file}.data", 0),
            }
            for stage in bundle.manifest.stages
        ],
        "checks": bundle.manifest.checks["export"],
    }


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['model']} in {summary['bundle']}", title_justify="left")
    for column in ("stage", "precision", "MB", "largest difference from PyTorch", "checks"):
        table.add_column(column, justify="right" if column == "MB" else "left")
    for stage in summary["stages"]:
        checks = summary["checks"]["stages"][stage["name"]]
        passed = sum(key not in ("passes", "builder") for key in checks)
        table.add_row(
            stage["name"],
            stage["precision"],
            f"{stage['bytes'] / 1e6:.1f}",
            f"{checks['onnxruntime']['max_abs']:.1e}",
            f"{passed} passed",
        )
    console = Console()
    console.print(table)
    generates = any(stage["name"] == "llm" for stage in summary["stages"])
    verb, words = ("run", "--prompt TEXT") if generates else ("score", "--text TEXT")
    console.print(
        f"{summary['bytes'] / 1e6:.1f} MB in {summary['seconds']} s; next: "
        f"bridgeport {verb} {summary['bundle']} --image PICTURE {words}",
        markup=False,
        highlight=False,
    )
