"""A checkpoint directory to a bundle: every stage exported, checked on what was written, and recorded."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..bundle import Bundle, check_output, output_errors, sha256, staged_directory, write_manifest
from ..manifest import CONFIG_FILE, CheckpointRecord, Manifest
from ..models import load_checkpoint
from ..models.contract import KvCacheContract
from ..models.reduction_contract import parse_reduction
from ..models.remote_code import remote_code
from ..models.t5 import t5_seq2seq
from .disk import check_room, disk_full_as_os_error
from .foreign import freeze_foreign
from .idefics_processor import freeze_flamingo
from .llm.flamingo_stages import export_flamingo
from .llm.seq2seq_stages import export_seq2seq
from .options import check_libraries, check_options, needs_calibration
from .processor import freeze_processor
from .reduction import fit_layout
from .stages import Progress, export_decoder, export_traced, lint_stages

if TYPE_CHECKING:
    from ..models.checkpoint import VisionLanguageModel


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    precision: str = "fp32",
    target: str = "cpu",
    calibration: str | Path | None = None,
    reduce_tokens: str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export the checkpoint directory `checkpoint` to a bundle at `out`.

    ``precision``: "fp32", or "int4" for INT4 weights in the language model with the other stages in FP32. Every other
    precision, and every target but "cpu", goes on to quantise (`calibration.quantize_bundle`, with its defaults) on
    the pictures in ``calibration``. ``reduce_tokens``: "pool:S", "tome:R" or "queries:K", for a connector that gives
    fewer tokens (see `models.reduction`). ``force``: replace a directory at `out`. ``trust_remote_code``: run Python
    code that the checkpoint's directory holds for its config, tokenizer and processor, with the rights of this
    process. ``progress`` is called with a line before each step. Nothing is left at or beside `out` unless everything
    succeeded.

    Raises InputError for an option whose value is unknown or does not fit the model, UnsupportedError for a precision,
    target, reduction or architecture that is not built yet, CheckpointError for a checkpoint that cannot be read,
    ExportError for a graph that misses a check, OutputError when `out` cannot be written.
    """
    check_options(precision, target, calibration)
    reduction = None if reduce_tokens is None else parse_reduction(reduce_tokens)
    check_libraries()
    if needs_calibration(precision, target):
        return _export_and_quantize(
            checkpoint,
            out,
            str(calibration),
            (precision, target),
            force=force,
            reduce_tokens=reduce_tokens,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    say = progress or _say_nothing
    say("reading the checkpoint")
    with remote_code(allowed=trust_remote_code):
        model = load_checkpoint(checkpoint, allow_pickle=allow_pickle)
    if reduction is not None:
        from ..models.reduction import reduce_tokens as reduced

        model = reduced(model, reduction)
    trust = remote_code(allowed=trust_remote_code)
    with trust, staged_directory(out, force=force, protect=(model.path,)) as staging, disk_full_as_os_error():
        check_room(model, staging)
        if model.kv_cache is None:
            from .score import write_score_manifest

            manifest = write_score_manifest(model, staging, precision, say)
        else:
            manifest = _write_bundle(model, model.kv_cache, staging, precision, say)
    return Bundle(Path(out), manifest)


def _export_and_quantize(
    checkpoint: str | Path, out: str | Path, calibration: str, aim: tuple[str, str], *, force: bool, **options: Any
) -> Bundle:
    """The FP32 bundle is written beside `out`, quantised from there, and removed."""
    from ..calibration import QuantizeOptions, quantize_bundle

    check_output(out, force=force)
    place = Path(os.path.abspath(out)).parent  # noqa: PTH100 - as `staged_directory` does
    with output_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{Path(out).name}.", suffix=".fp32", dir=place)
    with scratch:
        exact = export_checkpoint(checkpoint, Path(scratch.name) / "bundle", **options)
        choices, protect = QuantizeOptions(precision=aim[0], target=aim[1]), (Path(checkpoint),)
        return quantize_bundle(
            exact.path, out, calibration, choices, force=force, progress=options["progress"], protect=protect
        )


def _say_nothing(_: str) -> None:
    pass


def _write_bundle(
    model: VisionLanguageModel, cache: KvCacheContract, staging: Path, precision: str, say: Progress
) -> Manifest:
    say("freezing processor and tokenizer")
    frozen = freeze_foreign(model, staging / "tokenizer") or freeze_processor(model, staging / "tokenizer")
    # What was held against the checkpoint's processor, with the tokens of a connector that it does not know of.
    image, prompt, generation = fit_layout(frozen.image, model.layout), frozen.prompt, frozen.generation
    if "not_built" in (videos := frozen.checks.get("video", {})):
        say(f"the bundle takes pictures and no videos: {videos['not_built']}")
    _keep_config(model, staging)
    seq2seq = t5_seq2seq(model.text_config) if "llm_encoder" in model.contracts else None
    flamingo = freeze_flamingo(model) if "cross_kv" in model.contracts else None
    stages = [
        export_traced(model, name, staging, say, max_id=generation.vocab_size if name == "embed_tokens" else 2)
        for name in model.contracts
        if name not in ("llm_encoder", "cross_kv", "llm") and (name != "video_connector" or frozen.video is not None)
    ]
    if seq2seq is not None:
        stages += export_seq2seq(model, staging, precision, say)
    elif flamingo is not None:
        stages += export_flamingo(model, cache, flamingo, staging, precision, say)
    else:
        stages.append(export_decoder(model, cache, staging, precision, say))
    say("linting the graphs")
    lint_stages(stages, staging)
    say("hashing the bundle")
    checks = {stage.record.contract.name: stage.checks for stage in stages}
    manifest = Manifest(
        bridgeport_version=__version__,
        model_kind=model.kind,
        target="cpu",
        checkpoint=_describe_checkpoint(model),
        stages=tuple(stage.record for stage in stages),
        kv_cache=cache,
        seq2seq=seq2seq,
        flamingo=flamingo,
        image=image,
        video=frozen.video,
        prompt=prompt,
        generation=generation,
        tokenizer=frozen.tokenizer.relative_to(staging).as_posix(),
        reduction=model.layout.reduction,
        custom_connector=model.layout.custom_connector,
        checks={"export": {"stages": checks, "processor": frozen.checks}},
    )
    return write_manifest(staging, manifest)


def _keep_config(model: VisionLanguageModel, staging: Path) -> None:
    """The checkpoint's config beside the graphs: benchmarks build PyTorch's model of the same sizes from it."""
    kept = staging / CONFIG_FILE
    kept.parent.mkdir()
    source = model.path / kept.name
    if source.is_file():
        shutil.copyfile(source, kept)
    else:  # a project's own layout, whose config was put together on reading
        kept.write_text(model.config.to_json_string(use_diff=False), encoding="utf-8")


def _describe_checkpoint(model: VisionLanguageModel) -> CheckpointRecord:
    return CheckpointRecord(
        architecture=model.architecture,
        model_type=model.config.model_type,
        text_model_type=model.text_config.model_type,
        sha256={model.relative_path(file): sha256(file) for file in model.files},
    )
