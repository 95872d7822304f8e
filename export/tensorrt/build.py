"""A bundle of ONNX graphs to a bundle of TensorRT engines, on the machine that will run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..._version import __version__
from ..._wire import external_data_locations, opset_imports
from ...bundle import Bundle, check_output, sha256, staged_directory, write_manifest
from ...engine_record import BuildOptions, EngineProfile, EngineRecord, MachineRecord
from ...errors import CheckFailed, InputError, OutputError, UnsupportedError
from ...manifest import StageRecord
from ...runtime.tensorrt.api import load_api
from ...runtime.tensorrt.loader import find_local_machine
from ...runtime.tensorrt.versions import Version, check_member
from .child import Progress, run_child
from .devices import check_device, device_of, find_device, with_device_limits, with_recommended
from .graphs import copy_graphs
from .job import BuildEvent, StageJob, StageResult
from .profiles import bundle_profiles, narrow_contract, narrow_generation, stage_inputs
from .timing_cache import device_lock, timing_cache_file

if TYPE_CHECKING:
    from ..preflight.report import PreflightReport

_DOMAINS = frozenset({"", "ai.onnx"})


@dataclass(frozen=True)
class BuildRun:
    """Where a build reads and writes beside the bundle.

    `timing_cache`: file, None for the user's cache directory; `use_timing_cache`: False for none at all. `log`: file
    that TensorRT's messages are added to, verbose ones too.
    """

    timing_cache: Path | None = None
    use_timing_cache: bool = True
    log: Path | None = None
    skip_preflight: bool = False


def build_bundle(
    bundle: str | Path,
    out: str | Path,
    *,
    device: str = "local",
    profiles: Sequence[str] = (),
    options: BuildOptions | None = None,
    run: BuildRun | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Build an engine for every stage of `bundle` and write a bundle that holds them beside the graphs.

    `device`: "local", or a name of `devices.DEVICES` that this machine must be. `profiles`: values of `--profile`.
    Everything that can be known before the first engine is checked first; each engine is built in a process of its own;
    `out` appears whole or not at all.

    Raises DependencyError without TensorRT, without a driver or with one too old, UnsupportedError without a GPU, on
    another device or for graphs that TensorRT cannot read, InputError for profiles outside of the contract and options
    that this TensorRT lacks, CheckFailed when preflight finds errors, EngineError when a build fails (out of memory:
    what to lower), OutputError when `out` cannot be written.
    """
    say, settings = progress or _say_nothing, run or BuildRun()
    find_device(device)
    source = Bundle.load(bundle)
    check_output(out, force=force, protect=(source.path,))
    check_buildable(source)
    plans = bundle_profiles(source.manifest, profiles)
    _check_log(settings.log)
    machine = find_build_machine()
    check_device(device, machine)
    level = "NONE" if options is None else options.hardware_compatibility
    check_member(Version.parse(machine.tensorrt), "HardwareCompatibilityLevel", level)
    report = None if settings.skip_preflight else _preflight(source, machine, device, profiles, say)
    memory = None if report is None else report.memory
    chosen = with_recommended(options or BuildOptions(), None if memory is None else memory.settings)
    chosen = with_device_limits(chosen, device, machine)
    with device_lock(machine, lambda text: say(BuildEvent("note", text=text))):
        # Once more: a build that this one waited for may have written there.
        check_output(out, force=force, protect=(source.path,))
        with staged_directory(out, force=force, protect=(source.path,)) as staging:
            copy_graphs(source, staging)  # a stripped plan is refitted from them, another device builds from them
            job = _Jobs(source, staging, machine, chosen, settings, requested_words(profiles, options))
            stages, results = job.build_all(plans, say)
            checks = {**source.manifest.checks, **_told(report, machine), "build": _summary(results)}
            update = {
                "stages": stages,
                "generation": narrow_generation(source.manifest, stages),
                "target": "tensorrt",
                "checks": checks,
                "bridgeport_version": __version__,
            }
            manifest = write_manifest(staging, source.manifest.model_copy(update=update))
    return Bundle(Path(out), manifest)


def find_build_machine() -> MachineRecord:
    """This machine, its TensorRT included. DependencyError or UnsupportedError where no engine can be built."""
    return find_local_machine(load_api())


def check_buildable(bundle: Bundle) -> None:
    """UnsupportedError for graphs that are made for ONNX Runtime, with the command that makes them for TensorRT."""
    how = (
        f"make one for it: bridgeport quantize {bundle.path} -o NEW --precision fp16 --target tensorrt --calibration "
        "DIR (from the bundle in FP32)"
    )
    if all(stage.quantization is None for stage in bundle.manifest.stages):
        how += f", or in FP32: bridgeport preflight {bundle.path} --fix -o NEW"
    for stage in bundle.manifest.stages:
        name = stage.contract.name
        foreign = sorted(set(opset_imports(bundle.graph(name))) - _DOMAINS)
        if foreign:
            raise UnsupportedError(
                f"{bundle.path}, stage {name}: the graph has operators of {foreign[0]}, which TensorRT does not know; "
                f"the bundle is made for {bundle.manifest.target}; {how}"
            )
        if stage.quantization is not None and bundle.manifest.target != "tensorrt":
            raise UnsupportedError(
                f"{bundle.path}, stage {name}: it was quantised ({stage.quantization.scheme}) for "
                f"{bundle.manifest.target}, whose rules are not TensorRT's; {how}"
            )


@dataclass(frozen=True)
class _Jobs:
    """The builds of one bundle."""

    source: Bundle
    staging: Path
    machine: MachineRecord
    options: BuildOptions
    settings: BuildRun
    requested: tuple[str, ...]

    def build_all(
        self, plans: dict[str, tuple[EngineProfile, ...]], say: Progress
    ) -> tuple[tuple[StageRecord, ...], dict[str, StageResult]]:
        """Every stage's record with its engine, and what each build told."""
        records, results = [], {}
        stages = self.source.manifest.stages
        for number, stage in enumerate(stages, start=1):
            name = stage.contract.name
            say(BuildEvent("stage", name, step=number, steps=len(stages)))
            results[name] = run_child(self._job(stage, plans[name]), say)
            records.append(self._record(stage, plans[name], results[name]))
        return tuple(records), results

    def _job(self, stage: StageRecord, profiles: tuple[EngineProfile, ...]) -> StageJob:
        named, log = self.settings.timing_cache, self.settings.log
        cache = (named or timing_cache_file(self.machine)) if self.settings.use_timing_cache else None
        return StageJob(
            stage=stage.contract.name,
            graph=str(self.staging / stage.file),
            plan=str(self.staging / plan_file(stage)),
            inputs=tuple(spec.name for spec in stage_inputs(stage, self.source.manifest)),
            profiles=tuple(one.model_dump() for one in profiles),
            options=self.options.model_dump(),
            timing_cache=str(cache) if cache is not None else None,
            strict_cache=named is not None,
            log=str(log.absolute()) if log is not None else None,
            staging=str(self.staging),
        )

    def _record(self, stage: StageRecord, profiles: tuple[EngineProfile, ...], result: StageResult) -> StageRecord:
        engine = EngineRecord(
            file=plan_file(stage),
            machine=self.machine,
            profiles=profiles,
            precision=stage.precision,
            sources={file: sha256(self.staging / file) for file in graph_files(self.source, stage)},
            flags=result.flags,
            options=self.options,
            requested=self.requested,
            bridgeport_version=__version__,
        )
        contract = narrow_contract(stage.contract, profiles)
        return stage.model_copy(update={"engine": engine, "format": "tensorrt", "contract": contract})


def requested_words(profiles: Sequence[str], options: BuildOptions | None) -> tuple[str, ...]:
    """The command line's words for what was asked; limits that came with the device are not among them."""
    words = [word for text in profiles for word in ("--profile", text)]
    return (*words, *(options.arguments() if options is not None else ()))


def plan_file(stage: StageRecord) -> str:
    """Where the stage's plan is in the bundle: beside its graph, under the graph's name."""
    return str(PurePosixPath(stage.file).with_suffix(".plan"))


def graph_files(bundle: Bundle, stage: StageRecord) -> list[str]:
    """The stage's graph and its external data, as paths in the bundle."""
    parent = PurePosixPath(stage.file).parent
    data = sorted(external_data_locations(bundle.path / stage.file))
    return [stage.file, *(str(parent / name) for name in data)]


def _check_log(log: Path | None) -> None:
    """OutputError now for a log that cannot be written, not after the first stage."""
    if log is None:
        return
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.open("a").close()
    except OSError as error:
        raise OutputError(f"the log {log} cannot be written ({error.strerror}); name another file") from error


def _summary(results: dict[str, StageResult]) -> dict[str, object]:
    stages = {
        name: {"seconds": one.seconds, "bytes": one.size, "warnings": list(one.warnings)}
        for name, one in results.items()
    }
    return {"stages": stages, "seconds": round(sum(one.seconds for one in results.values()), 1)}


def _preflight(
    source: Bundle, machine: MachineRecord, device: str, profiles: Sequence[str], say: Progress
) -> PreflightReport | None:
    """What preflight found, None where it cannot run. CheckFailed for errors."""
    if util.find_spec("onnx_ir") is None or util.find_spec("onnxruntime") is None:
        say(BuildEvent("note", text="preflight is left out: it needs onnx, onnx-ir and onnxruntime"))
        return None
    from ..preflight.run import parse_version, preflight

    try:
        parse_version(machine.tensorrt)
    except InputError as error:
        say(BuildEvent("note", text=f"preflight is left out: {error}"))
        return None
    report = preflight(
        source,
        tensorrt=machine.tensorrt,
        device=device_of(device, machine),
        profiles=profiles,
        progress=lambda text: say(BuildEvent("status", text=f"preflight: {text}")),
    )
    errors = [finding for finding in report.findings if finding.severity == "error"]
    if errors:
        first, number = errors[0], "1 error" if len(errors) == 1 else f"{len(errors)} errors, the first"
        raise CheckFailed(
            f"not built: preflight found {number} in {first.stage}, {first.node}: {first.why}; {first.fix} (all of it: "
            f"bridgeport preflight {source.path} --tensorrt {machine.tensorrt}; to build in spite of it: "
            "--skip-preflight)"
        )
    return report


def _told(report: PreflightReport | None, machine: MachineRecord) -> dict[str, object]:
    """What preflight found, as a check of the manifest."""
    if report is None:
        return {}
    return {"preflight": {"tensorrt": machine.tensorrt, "warnings": report.count("warning")}}


def _say_nothing(_: BuildEvent) -> None:
    pass
