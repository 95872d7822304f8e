"""`bridgeport build`: TensorRT engines from a bundle, or a script that builds them elsewhere."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...cli_options import OptimizationLevel, PrivateKey, Profiles, TacticDram, Tf32, Workspace

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ...bundle import Bundle
    from ..tensorrt.job import BuildEvent


def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle made for TensorRT (quantize --target tensorrt).")],
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="BUNDLE", help="Directory to write; with --emit a file, else stdout."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="local, orin-nano, orin-nx, agx-orin, thor, l4, h200, ...: what this machine must be.")
    ] = "local",
    profile: Profiles = None,
    optimization_level: OptimizationLevel = None,
    workspace: Workspace = None,
    tactic_dram: TacticDram = None,
    tf32: Tf32 = False,
    hardware_compatibility: Annotated[
        str, typer.Option(help="NONE, AMPERE_PLUS or SAME_COMPUTE_CAPABILITY (TensorRT 10.9): other GPUs, slower.")
    ] = "NONE",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engines that newer versions of TensorRT load, slower.")
    ] = False,
    strip: Annotated[
        bool, typer.Option("--strip", help="Plans without weights, which loading takes from the ONNX files.")
    ] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights may stay on the host; excludes CUDA graphs.")
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Another timing cache than the one in the user's cache.")
    ] = None,
    no_timing_cache: Annotated[bool, typer.Option("--no-timing-cache", help="Measure every kernel anew.")] = False,
    skip_preflight: Annotated[
        bool, typer.Option("--skip-preflight", help="Build in spite of what preflight finds.")
    ] = False,
    emit: Annotated[
        str | None, typer.Option(metavar="TOOL", help="trtexec or polygraphy: write a script, build nothing.")
    ] = None,
    sign: PrivateKey = None,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="Add all messages of TensorRT to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was built as JSON.")] = False,
) -> None:
    """Build TensorRT engines for every stage, on the GPU that will run them."""
    from ..tensorrt.options import make_options

    options = make_options(
        optimization_level=optimization_level,
        workspace_mib=workspace,
        tactic_dram_mib=tactic_dram,
        tf32=tf32,
        hardware_compatibility=hardware_compatibility,
        version_compatible=version_compatible,
        strip=strip,
        weight_streaming=weight_streaming,
    )
    if timing_cache is not None and no_timing_cache:
        raise typer.BadParameter("--timing-cache and --no-timing-cache exclude each other")
    if emit is not None:
        _refuse_with_emit(
            {
                "--timing-cache": timing_cache,
                "--no-timing-cache": no_timing_cache,
                "--skip-preflight": skip_preflight,
                "--sign": sign,
                "--log": log,
                "--json": as_json,
            }
        )
        _emit(bundle, emit, profile or [], options, device, out, force=force)
        return
    if out is None:
        raise typer.BadParameter("name the bundle to write with -o BUNDLE, or a tool with --emit")
    from ..tensorrt.build import BuildRun, build_bundle
    from ..tensorrt.sign import load_private_key, sign_bundle

    if sign is not None:
        load_private_key(sign)  # a key that cannot be used is answered before an hour of building
    run = BuildRun(timing_cache, not no_timing_cache, log, skip_preflight)
    started = time.perf_counter()
    with Bars() as bars:
        built = build_bundle(
            bundle,
            out,
            device=device,
            profiles=profile or [],
            options=options,
            run=run,
            force=force,
            progress=bars.take,
        )
    if sign is not None:
        sign_bundle(built.path, sign)
    summary = summarize(built, time.perf_counter() - started)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        _print(summary)


def _refuse_with_emit(given: dict[str, object]) -> None:
    if names := [name for name, value in given.items() if value]:
        raise typer.BadParameter(f"--emit writes a script and builds nothing; leave {', '.join(names)} out")


def _emit(
    bundle: Path, kind: str, profiles: list[str], options: Any, device: str, out: Path | None, *, force: bool
) -> None:
    from ...bundle import Bundle, output_errors
    from ...errors import OutputError
    from ..tensorrt.emit import emit_script
    from ..tensorrt.graphs import check_outside

    if out is not None:
        check_outside(out, bundle)
    script = emit_script(Bundle.load(bundle), kind, profiles, options=options, device=device)  # type: ignore[arg-type]
    if out is None:
        typer.echo(script, nl=False)
        return
    with output_errors(out):
        if out.is_dir() or (out.exists() and not force):
            raise OutputError(f"{out} exists; name another file, or replace it with --force")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(script, encoding="utf-8")


class Bars:
    """Progress of a build on stderr: a line per stage, a bar per phase that TensorRT has open."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(file=sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        # Nothing but an error is printed when stderr is no terminal.
        shown = self.console.is_terminal
        options: dict[str, Any] = {"console": self.console, "transient": True, "disable": not shown}
        self.progress: Progress = Progress(*columns, TimeElapsedColumn(), **options)
        self._open: dict[str, TaskID] = {}
        self._depth: dict[str, int] = {}

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def take(self, event: BuildEvent) -> None:
        """Show one event."""
        if event.kind == "stage":
            self._close_all()
            self._say(f"building {event.stage} ({event.step} of {event.steps})")
        elif event.kind == "status":
            self._close_all()
            self._open[""] = self.progress.add_task(event.text, total=None)
        elif event.kind == "note":
            self._say(event.text)
        elif event.kind == "phase":
            depth = self._depth[event.phase] = self._depth.get(event.parent, -1) + 1
            self._open[event.phase] = self.progress.add_task("  " * depth + event.phase, total=event.steps)
        elif event.kind == "step" and event.phase in self._open:
            self.progress.update(self._open[event.phase], completed=event.step)
        elif event.kind == "finish" and event.phase in self._open:
            self.progress.remove_task(self._open.pop(event.phase))

    def _close_all(self) -> None:
        for task in self._open.values():
            self.progress.remove_task(task)
        self._open.clear()
        self._depth.clear()

    def _say(self, text: str) -> None:
        if self.console.is_terminal:
            self.console.print(text, markup=False, highlight=False)


def summarize(bundle: Bundle, seconds: float) -> dict[str, Any]:
    """What was built: machine, stages with their plans, profiles, flags and seconds."""
    stages = []
    told = bundle.manifest.checks["build"]["stages"]
    sizes = {file.path: file.size for file in bundle.manifest.files}
    machine: dict[str, Any] = {}
    for stage in bundle.manifest.stages:
        if (engine := stage.engine) is None:
            continue
        name, machine = stage.contract.name, engine.machine.model_dump()
        stages.append(
            {
                "name": name,
                "plan": engine.file,
                "precision": engine.precision,
                "bytes": sizes[engine.file],
                "seconds": told[name]["seconds"],
                "profiles": [{"name": profile.name, "axes": profile.axes} for profile in engine.profiles],
                "flags": list(engine.flags),
                "warnings": told[name]["warnings"],
            }
        )
    return {"bundle": str(bundle.path), "seconds": round(seconds, 1), "machine": machine, "stages": stages}


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = summary["machine"]
    title = (
        f"{summary['bundle']}: TensorRT {machine['tensorrt']}, {machine['gpu']} (SM {machine['compute_capability']})"
    )
    table = Table(title=title, title_justify="left")
    for column in ("stage", "precision", "MB", "seconds", "profiles", "flags"):
        table.add_column(column, justify="right" if column in ("MB", "seconds") else "left", overflow="fold")
    for stage in summary["stages"]:
        table.add_row(
            stage["name"],
            stage["precision"],
            f"{stage['bytes'] / 1e6:.1f}",
            f"{stage['seconds']:.1f}",
            "\n".join(_profile(one) for one in stage["profiles"]),
            ", ".join(stage["flags"]) or "none",
        )
    console = Console()
    console.print(table)
    for stage in summary["stages"]:
        for text in stage["warnings"]:
            console.print(f"{stage['name']}: TensorRT warns: {text}", markup=False, highlight=False)
    console.print(f"built in {summary['seconds']} s", markup=False, highlight=False)


def _profile(profile: dict[str, Any]) -> str:
    axes = " ".join(f"{axis}={','.join(map(str, sizes))}" for axis, sizes in profile["axes"].items())
    return axes if profile["name"] == "default" else f"{profile['name']}: {axes}"
