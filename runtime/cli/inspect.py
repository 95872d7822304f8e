"""`bridgeport inspect`: what is in a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...cli_options import PublicKey

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ...bundle import Bundle
    from ...manifest import (
        CalibrationRecord,
        ImageContract,
        PromptContract,
        QuantizationRecord,
        ScoreContract,
        StageRecord,
    )
    from ...models.contract import TensorSpec


# Layers that stayed finer, as many as are named.
_SHOWN = 3


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Directory that `bridgeport export` wrote.")],
    public_key: PublicKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole manifest as JSON.")] = False,
) -> None:
    """Show a bundle's stages, axes, precision, sizes, hashes and contracts; every file is verified first."""
    from ...bundle import Bundle

    if public_key is None:
        loaded = Bundle.load(bundle)
    else:
        from ...export.tensorrt.sign import verify_bundle

        loaded = verify_bundle(bundle, public_key)
    if as_json:
        typer.echo(json.dumps(describe(loaded), indent=2))
        return
    _print(loaded, signed=public_key is not None)


def describe(bundle: Bundle) -> dict[str, Any]:
    """The manifest as plain data, with each stage's size in bytes beside it."""
    document = bundle.manifest.model_dump(mode="json")
    for stage, record in zip(document["stages"], bundle.manifest.stages, strict=True):
        stage["bytes"] = stage_bytes(bundle, record)
    return document


def stage_bytes(bundle: Bundle, record: StageRecord) -> int:
    """Bytes of the stage's graph and its external data."""
    graphs = {record.file, *record.variants.values()}
    mine = graphs | {f"{record.file}.data"}
    return sum(file.size for file in bundle.manifest.files if file.path in mine)


def _print(bundle: Bundle, *, signed: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    manifest = bundle.manifest
    console = Console()
    console.print(
        f"[bold]{escape(str(bundle.path))}[/]  {manifest.model_kind}, for {manifest.target}, every file verified"
        + (", signed with the key" if signed else "")
    )
    console.print(
        f"made by bridgeport {manifest.bridgeport_version} from {manifest.checkpoint.architecture} "
        f"(text model {manifest.checkpoint.text_model_type})"
    )
    for record in manifest.stages:
        _print_stage(console, bundle, record)
    if manifest.kv_cache is not None:
        cache = manifest.kv_cache
        console.print(
            f"\nKV cache   {cache.num_layers} layers x {cache.num_heads} heads x {cache.head_size}, {cache.dtype}, "
            f"{'one shared buffer' if cache.shared_buffer else 'past and present apart'}"
        )
    _print_contract(console, "picture", manifest.image)
    if manifest.video is not None:
        _print_contract(console, "video", manifest.video)
    if manifest.reduction is not None:
        console.print(f"reduced    {manifest.reduction}: a picture has fewer tokens than the checkpoint gives it")
    if manifest.calibration is not None:
        _print_calibration(console, manifest.calibration, manifest.checks.get("gate", {}))
    if manifest.custom_connector is not None:
        console.print(f"connector  {manifest.custom_connector!r}, in the place of the class's own", markup=False)
    if manifest.prompt is not None:
        console.print("prompt     " + _prompt(manifest.prompt), markup=False, highlight=False)
        if (read := manifest.prompt.instruction) is not None:
            words = f"connector  reads the prompt too, through {read.tokenizer}, at most {read.max_length} tokens"
            console.print(words, markup=False, highlight=False)
    if manifest.score is not None:
        console.print("score      " + _score(manifest.score), markup=False, highlight=False, soft_wrap=True)
    if manifest.generation is not None:
        generation = manifest.generation
        console.print(f"context    {generation.context_length} tokens, stops at {list(generation.eos_token_ids)}")
    console.print(_file_table(bundle))


def _score(score: ScoreContract) -> str:
    """What is made of the cosine, and how texts are laid out."""
    text = score.text
    learned = "" if "match" in score.methods else f" of {score.scale:.6g} x cosine {score.bias:+.6g}"
    padding = f"padded to the {'longest' if text.padding == 'longest' else 'full length'}"
    return f"cosine, {', '.join(score.methods)}{learned}; texts of up to {text.max_length} tokens, {padding}"


def _prompt(prompt: PromptContract) -> str:
    """The segments; a picture is shown as the checkpoint's image token."""
    picture = prompt.image.replace("{image}", f"<{prompt.image_token} x tokens>")
    parts = [
        f"pictures as {prompt.image_token} (id {prompt.image_token_id})"
        if segment.kind == "image"
        else f"{segment.template!r}{' with special tokens' if segment.add_special_tokens else ''}"
        for segment in prompt.segments
    ]
    with_images = any(segment.kind == "text" and "{images}" in segment.template for segment in prompt.segments)
    return " + ".join(parts) + (f", each picture {picture!r}" if with_images else "")


def _print_contract(console: Console, name: str, contract: ImageContract) -> None:
    tiling = " ".join(f"{key}={value}" for key, value in contract.tiling.model_dump().items() if key != "kind")
    console.print(f"{name:<10} RGB, {contract.tiling.kind} ({tiling})", soft_wrap=True, highlight=False)
    console.print("tile       " + ", ".join(_step(step.model_dump()) for step in contract.steps), soft_wrap=True)


def _print_stage(console: Console, bundle: Bundle, record: StageRecord) -> None:
    contract = record.contract
    size = stage_bytes(bundle, record) / 2**20
    variants = "".join(f", variant {name}" for name in record.variants)
    console.print(
        f"\n[bold]{contract.name}[/]  {record.precision}, opset {record.opset}, {size:,.1f} MiB, "
        f"{record.file}{variants}",
        highlight=False,
    )
    for word, specs in (("takes", contract.inputs), ("gives", contract.outputs)):
        for spec in specs:
            console.print(f"  {word} {_tensor(spec)}", markup=False, highlight=False, soft_wrap=True)
            word = "     "
    if (engine := record.engine) is not None:
        machine, flags = engine.machine, ", ".join(engine.flags) or "none"
        console.print(
            f"  engine {engine.file}, TensorRT {machine.tensorrt} on {machine.gpu} (SM {machine.compute_capability}), "
            f"flags {flags}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if record.quantization is not None:
        judged = bundle.manifest.checks.get("gate", {}).get("stages", ())
        gate = next((one for one in judged if one["stage"] == contract.name), None)
        _print_quantization(console, record.quantization, gate)
    axes = ", ".join(f"{axis.name} {axis.min} to {axis.max} (tuned for {axis.opt})" for axis in contract.axes)
    console.print(f"  axes  {axes}", markup=False, highlight=False, soft_wrap=True)


def _print_quantization(console: Console, record: QuantizationRecord, gate: dict[str, Any] | None) -> None:
    """How the stage came to its precision, and what it kept."""
    from ...speed_hint import SpeedHint, check_speed_hint

    words = [f"scheme {record.scheme}"]
    if record.observer is not None:
        words.append(f"ranges by {record.observer} over {record.samples} pictures")
    if record.smoothed:
        words.append(f"{len(record.smoothed)} groups smoothed")
    lines = [", ".join(words)]
    if record.kept:
        shown = [f"{name} ({why})" for name, why in list(record.kept.items())[:_SHOWN]]
        rest = f", and {len(record.kept) - _SHOWN} more (--json)" if len(record.kept) > _SHOWN else ""
        lines.append(f"{len(record.kept)} kept finer: {', '.join(shown)}{rest}")
    if gate is not None:
        lines.append(_verdict(gate))
    if (written := record.details.get("speed_hint")) is not None:
        hint = SpeedHint.model_validate(written)
        lines.append(
            f"{hint.ratio:.2f} x as fast as FP32 on {hint.processor} ({hint.instruction_set}, {hint.engine} "
            f"{hint.version})"
        )
        if (warning := check_speed_hint(hint)) is not None:
            lines.append(f"warning: {warning}")
    for line in lines:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _verdict(gate: dict[str, Any]) -> str:
    """One stage's line of the gate."""
    slowdown = "not timed" if gate["slowdown"] is None else f"{gate['slowdown']:.2f} x the time of FP32"
    return f"gate: worst token's cosine {gate['min_token_cosine']:.5f} (least {gate['min_cosine']:g}), {slowdown}"


def _print_calibration(console: Console, record: CalibrationRecord, gate: dict[str, Any]) -> None:
    """What the bundle was quantised with, and what the gate found about the whole of it."""
    lines = [
        f"calibrated on {record.pictures} pictures, judged on {record.held_out} others (seed {record.seed}, data "
        f"{record.data[:16]}, from the bundle {record.source[:16]})"
    ]
    if (task := gate.get("task")) is not None:
        lines.append(
            f"task       {task['before']:.1f} % -> {task['after']:.1f} % of {task['items']} answers, "
            f"{task['drop']:.2f} points lost (paired standard error {task['standard_error']:.2f}, at most "
            f"{task['limit']:g})"
        )
    lines += [f"note       {note}" for note in gate.get("notes", ())]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _file_table(bundle: Bundle) -> Table:
    from rich.table import Table

    table = Table(title="Files", title_justify="left")
    table.add_column("path")
    table.add_column("bytes", justify="right")
    table.add_column("SHA-256 (first 16 of 64)")
    for file in bundle.manifest.files:
        table.add_row(file.path, f"{file.size:,}", file.sha256[:16])
    return table


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} [{', '.join(str(dim) for dim in spec.shape)}]"


def _step(step: dict[str, Any]) -> str:
    name = step.pop("op")
    return f"{name}({', '.join(f'{key}={_number(value)}' for key, value in step.items())})"


def _number(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_number(item) for item in value) + ")"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
