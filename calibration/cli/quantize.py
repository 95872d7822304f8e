"""`bridgeport quantize`: a bundle in FP32 to one that is smaller and faster, with what it keeps stated in it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import CheckFailed, InputError


def quantize(
    bundle: Annotated[Path, typer.Argument(help="Bundle in FP32, as `bridgeport export` writes it.")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Directory to write.")],
    precision: Annotated[
        str,
        typer.Option(
            help="fp16: all stages. int8: weights and activations of encoder and connector, weights of the language "
            "model. int4: weights of the language model. fp8: as int8, for TensorRT alone."
        ),
    ],
    calibration: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Pictures (with prompts.jsonl beside them, if there are prompts), .npz tensors or Polygraphy's JSON.",
        ),
    ],
    target: Annotated[str, typer.Option(help="What the bundle is made for: cpu, cuda or tensorrt.")] = "cpu",
    stage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PRECISION", help="Another precision for one stage, as in llm=int4; may be repeated."
        ),
    ] = None,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Leave the layers in FP32 whose rounding costs most, until --min-cosine is met."),
    ] = False,
    min_cosine: Annotated[
        float | None, typer.Option(help="Least cosine of the worst token with FP32; default by precision (see docs).")
    ] = None,
    max_slowdown: Annotated[float, typer.Option(help="Most time that a stage may take, over FP32's.")] = 1.0,
    task_drop: Annotated[float, typer.Option(help="Most points of exact match that may be lost.")] = 1.0,
    samples: Annotated[int, typer.Option(min=8, help="Most pictures to calibrate and judge with.")] = 128,
    observer: Annotated[
        str, typer.Option(help="What chooses ranges: minmax, moving-average, percentile, mse or entropy.")
    ] = "mse",
    engine: Annotated[
        str, typer.Option(help="What will run encoder and connector on a CPU: onnxruntime, or openvino (an extra).")
    ] = "onnxruntime",
    weights: Annotated[
        str, typer.Option(help="How 4-bit weights are rounded: rtn, to nearest, or gptq, fitted to the model's texts.")
    ] = "rtn",
    seed: Annotated[int, typer.Option(help="Which pictures calibrate and which judge.")] = 0,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep sensitivities and the Pareto picture of --auto here.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep observed activations here, to resume and to use again.")
    ] = None,
    save_inputs: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Also keep the encoder's inputs here, to calibrate with them again."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a directory that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made and judged as JSON.")] = False,
) -> None:
    """Quantise a bundle, and write it only if it is right and no slower: exit status 1, and no bundle, if it is not."""
    from rich.console import Console

    from ...export.options import check_libraries
    from ..gate import GateLimits
    from ..options import QuantizeOptions
    from ..plan import parse_overrides

    if report is not None and not auto:
        raise InputError(f"--report is what --auto found; add --auto, or leave --report {report} out")
    limits = GateLimits(min_cosine, max_slowdown, task_drop)
    options = QuantizeOptions(
        precision=precision,
        target=target,
        stages=parse_overrides(stage or []),
        observer=observer,
        samples=samples,
        seed=seed,
        auto=auto,
        engine=engine,
        weights=weights,
        cache=cache,
        report=report,
        save_inputs=save_inputs,
    )
    check_libraries()
    console = Console(file=sys.stderr)
    started = time.perf_counter()
    with console.status("starting") as status:
        from ..quantize import GateFailed, quantize_bundle

        failed: GateFailed | None = None
        try:
            quantize_bundle(bundle, out, calibration, options, limits=limits, force=force, progress=status.update)
        except GateFailed as error:
            failed = error
    if failed is None:
        from ...bundle import read_manifest

        gate = read_manifest(out).checks["gate"]
    else:
        gate = failed.report.to_json()
    document = {
        "bundle": str(out) if failed is None else None,
        "seconds": round(time.perf_counter() - started, 1),
        **gate,
    }
    if as_json:
        typer.echo(json.dumps(document, indent=2))
    else:
        _print(document)
    if failed is not None:
        raise CheckFailed(str(failed))


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(document))
    for one in document["stages"]:
        if one["blame"] is not None:
            console.print(f"{one['stage']}: {one['blame']} adds the largest error", markup=False, highlight=False)
    task = document["task"]
    if task is not None:
        console.print(
            f"task: {task['before']:.1f} % -> {task['after']:.1f} % of {task['items']} answers, "
            f"{task['drop']:.2f} points lost (paired standard error {task['standard_error']:.2f}, at most "
            f"{task['limit']:g})",
            highlight=False,
        )
    for note in document["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)
    if document["bundle"] is not None:
        console.print(
            f"written to {document['bundle']} in {document['seconds']} s; next: "
            f"bridgeport run {document['bundle']} --image PICTURE --prompt TEXT",
            markup=False,
            highlight=False,
        )


def _table(document: dict[str, Any]) -> Any:
    """One row for each stage that was judged; the numbers fold where the terminal is narrow, the verdict does not."""
    from rich.table import Table

    table = Table(title=f"Against FP32, on {document['pictures']} pictures that calibration did not see")
    table.title_justify = "left"
    table.add_column("stage", no_wrap=True)
    table.add_column("precision", no_wrap=True)
    table.add_column("worst token's cosine")
    table.add_column("ms, FP32 -> now")
    table.add_column("", no_wrap=True, min_width=6)
    for one in document["stages"]:
        times = "not timed"
        if one["slowdown"] is not None:
            times = f"{one['before_ms']:.1f} -> {one['after_ms']:.1f} (x {one['slowdown']:.2f})"
        table.add_row(
            one["stage"],
            one["precision"],
            f"{one['min_token_cosine']:.4f}, least {one['min_cosine']:g}",
            times,
            "[red]missed[/]" if one["failures"] else "[green]kept[/]",
        )
    return table
