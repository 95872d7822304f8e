"""A bundle in FP32 to one for another precision or target: observed, quantised, judged, and only then written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..bundle import Bundle, sha256, staged_directory, write_manifest
from ..errors import CheckFailed
from ..export.disk import disk_full_as_os_error
from ..manifest import CalibrationRecord, Manifest, StageRecord
from ..models.contract import KvCacheContract
from .blame import blame_layers
from .data import CalibrationData, open_calibration
from .data_save import check_name, save_stage_inputs
from .feed import feed_stages
from .gate import (
    GateLimits,
    GateReport,
    TaskVerdict,
    changed_stages,
    judge_stage,
    judge_task,
    stage_differences,
    time_bundles,
)
from .job import StageJob
from .options import MIN_PICTURES, QuantizeOptions
from .paths import check_places
from .plan import LANGUAGE_STAGES, check_gptq, plan_stages
from .stages import quantize_stage

Progress = Callable[[str], None]
# The part of the pictures that calibration does not see and the gate judges with, and how many suffice for that.
_HELD_OUT, _MOST_HELD_OUT = 0.25, 32


class GateFailed(CheckFailed):
    """The bundle missed a limit and was not written; `report` says which stage and layer."""

    def __init__(self, report: GateReport) -> None:
        super().__init__(f"not written: {'; '.join(report.failures())} (limits of `bridgeport quantize --help`)")
        self.report = report


def quantize_bundle(
    bundle: str | Path,
    out: str | Path,
    calibration: str | Path,
    options: QuantizeOptions,
    *,
    limits: GateLimits | None = None,
    force: bool = False,
    progress: Progress | None = None,
    protect: tuple[Path, ...] = (),
) -> Bundle:
    """Quantise the FP32 bundle at `bundle` on the data at `calibration`, judge the result, and write it to `out`.

    Nothing is left at or beside `out` unless the result passed the gate. Observed activations are kept in the cache,
    so a run that was interrupted goes on where it stopped.

    Raises InputError for options, data or a bundle that cannot be used, GateFailed for a result that misses a limit,
    OutputError when `out` cannot be written.
    """
    say, judged = progress or _say_nothing, limits or GateLimits()
    kept = (Path(bundle), Path(calibration), *protect)
    _check_places(Path(bundle), Path(out), kept, options, force=force)
    say("verifying the bundle")
    source = Bundle.load(bundle)
    plan = plan_stages(source.manifest, options.precision, options.target, options.stages)
    if options.weights == "gptq":
        check_gptq(plan)
    say("reading the calibration data")
    data = open_calibration(calibration, bundle=source, seed=options.seed, limit=options.samples, minimum=MIN_PICTURES)
    if options.save_inputs is not None:
        say("saving the encoder's inputs")
        save_stage_inputs(source, data, options.save_inputs)
    seen, held_out = data.split(min(max(1, round(data.pictures * _HELD_OUT)), _MOST_HELD_OUT))
    with staged_directory(out, force=force, protect=kept) as staging, disk_full_as_os_error():
        _copy_other_files(source, staging)
        jobs = [
            StageJob(source, staging, stage, aim, options, seen, say, {}, judged.cosine(aim))
            for stage, aim in zip(source.manifest.stages, plan.values(), strict=True)
        ]
        records = [quantize_stage(job) for job in jobs]
        manifest = _write_manifest(source, staging, records, options, (data, seen, held_out))
        report = judge(source, Bundle(staging, manifest), held_out, judged, say, options.engine)
        if not report.passed:
            raise GateFailed(report)
        checks = {**manifest.checks, "gate": report.to_json()}
        manifest = write_manifest(staging, manifest.model_copy(update={"checks": checks}))
    return Bundle(Path(out), manifest)


def _check_places(bundle: Path, out: Path, kept: tuple[Path, ...], options: QuantizeOptions, *, force: bool) -> None:
    if options.save_inputs is not None:
        check_name(options.save_inputs)
    directories = {"--cache": options.cache, "--report": options.report}
    files = {"--save-inputs": options.save_inputs}
    check_places(bundle, out, kept=kept, directories=directories, files=files, force=force)


def judge(
    source: Bundle,
    candidate: Bundle,
    held_out: CalibrationData,
    limits: GateLimits,
    say: Progress | None = None,
    engine: str = "onnxruntime",
) -> GateReport:
    """Hold `candidate`, run by `engine`, against `source` on pictures that calibration did not see."""
    tell = say or _say_nothing
    stages = changed_stages(source, candidate)
    fed = _fed_stages(stages, candidate, held_out)

    tell("judging: comparing with FP32")
    feeds = feed_stages(source, held_out, fed) if fed else iter(())
    differences = stage_differences(source, candidate, feeds, fed, engine)
    notes: list[str] = []
    tell("judging: timing")
    timings = _timings(source, candidate, held_out, notes, engine)
    verdicts = []
    for stage in stages:
        if stage not in differences:
            notes.append(f"{stage} has no part in this data and was not judged")
            continue
        timing = timings.get("llm" if stage in LANGUAGE_STAGES else stage)
        precision = candidate.manifest.stage(stage).precision
        verdicts.append(judge_stage(stage, precision, differences[stage], timing, limits))
    task = _judge_task(source, candidate, held_out, limits, notes, tell, engine)
    report = GateReport(tuple(verdicts), held_out.pictures, task, tuple(notes))
    return report if report.passed else blame_layers(report, source, candidate, held_out, tell)


def _fed_stages(stages: Sequence[str], candidate: Bundle, held_out: CalibrationData) -> list[str]:
    """Those of `stages` that the data must have inputs for.

    Tensors of other stages say nothing about a language model that stays in FP32 and only changed its form.
    """
    sample = next(held_out.samples(), None)
    if sample is None or sample.tensors is None:
        return list(stages)
    given = sample.tensors
    return [
        one
        for one in stages
        if one in given or not (one in LANGUAGE_STAGES and candidate.manifest.stage(one).precision == "fp32")
    ]


def _timings(
    source: Bundle, candidate: Bundle, held_out: CalibrationData, notes: list[str], engine: str
) -> dict[str, tuple[float, float, float]]:
    target = candidate.manifest.target
    if target != "cpu":
        notes.append(f"not timed: a bundle for {target} says nothing about its speed on this machine's CPU")
        return {}
    sample = next((one for one in held_out.samples() if one.picture is not None), None)
    if sample is None or sample.picture is None:
        notes.append("not timed: the calibration data has no pictures")
        return {}
    return time_bundles(source, candidate, sample, engine)


def _judge_task(
    source: Bundle,
    candidate: Bundle,
    held_out: CalibrationData,
    limits: GateLimits,
    notes: list[str],
    tell: Progress,
    engine: str,
) -> TaskVerdict | None:
    from .task import task_accuracy

    if source.manifest.score is not None:
        notes.append("no task: the bundle scores pictures against texts and answers nothing")
        return None
    examples = [one for one in held_out.samples() if one.answer is not None]
    if not examples:
        notes.append("no task: the calibration data has no answers (prompts.jsonl may give them)")
        return None
    tell("judging: asking FP32")
    before = task_accuracy(source, examples)
    tell("judging: asking the quantised bundle")
    return judge_task(before, task_accuracy(candidate, examples, engine=engine), limits.task_drop)


def _copy_other_files(source: Bundle, staging: Path) -> None:
    """Everything that is no graph: tokenizer, config, learned vectors."""
    graphs = {stage.file for stage in source.manifest.stages}
    graphs |= {file for stage in source.manifest.stages for file in stage.variants.values()}
    skipped = graphs | {f"{file}.data" for file in graphs}
    for record in source.manifest.files:
        if record.path not in skipped:
            target = staging / record.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / record.path, target)


def _write_manifest(
    source: Bundle,
    staging: Path,
    records: list[StageRecord],
    options: QuantizeOptions,
    data: tuple[CalibrationData, CalibrationData, CalibrationData],
) -> Manifest:
    whole, seen, held_out = data
    calibration = CalibrationRecord(
        source=sha256(source.path / "manifest.json"),
        data=whole.sha256,
        pictures=seen.pictures,
        held_out=held_out.pictures,
        seed=options.seed,
    )
    update: dict[str, Any] = {
        "bridgeport_version": __version__,
        "target": options.target,
        "stages": tuple(records),
        "calibration": calibration,
    }
    llm = next((one for one in records if one.contract.name == "llm"), None)
    if source.manifest.kv_cache is not None and llm is not None:
        update["kv_cache"] = cache_of(source.manifest, llm)
    return write_manifest(staging, source.manifest.model_copy(update=update))


def cache_of(manifest: Manifest, llm: StageRecord) -> KvCacheContract | None:
    """The cache's contract of a quantised decoder: FP16 where it computes in FP16, concatenated for TensorRT."""
    cache, details = manifest.kv_cache, {} if llm.quantization is None else llm.quantization.details
    if cache is None:
        return None
    update: dict[str, Any] = {"dtype": "float16"} if details.get("half") else {}
    if details.get("concatenated"):
        update["shared_buffer"] = False
    return cache.model_copy(update=update)


def _say_nothing(_: str) -> None:
    pass
