"""The process that builds one engine: `python -m bridgeport.export.tensorrt.worker`, a job on stdin, events on stdout.

A process for each stage gives the device's and the host's memory back whatever TensorRT keeps, and a crash inside the
library ends one child and not the command. The job is the first line of stdin; a second line, or the end of stdin (the
parent is gone), stops the build at its next step.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from ...errors import BridgeportError, EngineError, ExportError, OutputError
from ...runtime.tensorrt.api import Api, BuildProgress, MessageLog, load_api
from .job import StageJob, StageResult, memory_limits, read_cache
from .timing_cache import merge_timing_cache

STOPPED = "stopped"
# Steps come by the thousand; the pipe and the bar need a few a second.
_INTERVAL = 0.05
# Seconds that a build has to come to its next step when the parent is gone.
_GRACE = 10.0
# What TensorRT and CUDA write when memory ran out.
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "std::bad_alloc", "memory allocation")


class Reporter(BuildProgress):
    """Sends phases and steps to the parent, and says stop when it asks for that."""

    def __init__(self, answers: TextIO) -> None:
        self.answers = answers
        self.stop = threading.Event()
        self.orphaned = False
        self._lock = threading.Lock()
        self._sent: dict[str, float] = {}

    def send(self, **event: Any) -> None:
        """One line; a parent that is gone is none of the build's business here."""
        with self._lock:
            try:
                print(json.dumps(event), file=self.answers, flush=True)
            except OSError:
                self.stop.set()

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        self.send(event="phase", phase=phase, parent=parent or "", steps=steps)

    def step_complete(self, phase: str, step: int) -> bool:
        now = time.monotonic()
        if now - self._sent.get(phase, 0.0) >= _INTERVAL:
            self._sent[phase] = now
            self.send(event="step", phase=phase, step=step + 1)
        return not self.stop.is_set()

    def phase_finish(self, phase: str) -> None:
        self.send(event="finish", phase=phase)


def main() -> None:
    """Read the job, build, and answer with "done", "stopped" or "error"."""
    # Whatever a library prints, from C++ too, must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = StageJob.from_line(sys.stdin.readline())
    reporter = Reporter(answers)
    finished = threading.Event()
    threading.Thread(target=_watch_parent, args=(job, reporter, finished), daemon=True).start()
    try:
        result = build_stage(job, reporter)
        reporter.send(event="done", **vars(result))
    except _StoppedError:
        reporter.send(event=STOPPED)
    except MemoryError:
        reporter.send(event="error", kind="MemoryError", message="the host's memory is used up")
    except OSError as error:  # the disk is full, or the place not writable: the parent tells it as it tells its own
        reporter.send(event="error", kind="OSError", message=str(error), errno=error.errno, file=str(error.filename))
    except BridgeportError as error:
        kind = "MemoryError" if _ran_out_of_memory(str(error)) else type(error).__name__
        reporter.send(event="error", kind=kind, message=str(error))
    finally:
        finished.set()
        if reporter.orphaned:
            _remove_staging(job)


def build_stage(job: StageJob, reporter: Reporter) -> StageResult:
    """Build the engine of `job`, write its plan, and merge the timing cache."""
    with ExitStack() as stack:
        log = MessageLog()
        if job.log is not None:
            stream = stack.enter_context(Path(job.log).open("a", encoding="utf-8"))
            stream.write(f"== stage {job.stage}: {job.graph}\n")
            log = MessageLog.to_stream(stream)
        api = load_api(log)
        started = time.monotonic()
        config, plan = _build(api, job, reporter)
        Path(job.plan).write_bytes(plan)
        if job.timing_cache is not None:
            _share_timings(api, config, Path(job.timing_cache), reporter)
        flags = api.flag_names(config)
        seconds = round(time.monotonic() - started, 3)
        return StageResult(tuple(flags), len(plan), seconds, tuple(dict.fromkeys(log.warnings)))


def _build(api: Api, job: StageJob, reporter: Reporter) -> tuple[Any, bytes]:
    """(builder config, plan), in the order that TensorRT documents."""
    options = job.build_options()
    builder = api.create_builder()
    network = api.create_strongly_typed_network(builder)
    config = api.create_config(builder)
    api.set_tf32(config, options.tf32)
    api.set_flags(config, options.flags())
    api.set_effort(config, optimization_level=options.optimization_level)
    api.set_hardware_compatibility(config, options.hardware_compatibility)
    api.set_memory_limits(config, memory_limits(options))
    api.set_profiling_verbosity(config, "DETAILED")  # what the engine inspector shows later; no cost at run time
    api.parse_onnx(api.create_parser(network, config), Path(job.graph))
    _check_inputs(job, [tensor.name for tensor in api.network_tensors(network) if tensor.mode == "input"])
    for _, shapes in job.profile_shapes():
        api.add_profile(builder, config, shapes)
    if job.timing_cache is not None:
        _load_timings(api, config, job, reporter)
    try:
        plan = api.build_serialized(builder, network, config, reporter)
    except EngineError:
        if reporter.stop.is_set():
            raise _StoppedError from None
        raise
    if reporter.stop.is_set():
        raise _StoppedError
    return config, plan


def _check_inputs(job: StageJob, found: list[str]) -> None:
    """A graph whose inputs are not the contract's would fail later, at a profile or at the first run."""
    missing, unknown = sorted(set(job.inputs) - set(found)), sorted(set(found) - set(job.inputs))
    if missing or unknown:
        raise ExportError(
            f"{job.stage}: the network has inputs {', '.join(sorted(found))}, the contract "
            f"{', '.join(sorted(job.inputs))}; export the bundle again"
        )


def _load_timings(api: Api, config: Any, job: StageJob, reporter: Reporter) -> None:
    try:
        api.load_timing_cache(config, read_cache(job.timing_cache))
    except EngineError as error:
        if job.strict_cache:
            raise EngineError(f"--timing-cache {job.timing_cache}: {error}") from error
        reporter.send(event="note", text=f"a new timing cache is begun: {error}")
        api.load_timing_cache(config)


def _share_timings(api: Api, config: Any, file: Path, reporter: Reporter) -> None:
    try:
        merge_timing_cache(file, api.timing_cache_bytes(config), lambda parts: api.combine_timing_caches(config, parts))
    except OutputError as error:  # the engine is built: no reason to lose it
        reporter.send(event="note", text=str(error))


def _watch_parent(job: StageJob, reporter: Reporter, finished: threading.Event) -> None:
    """Wait for a line (stop) or the end of stdin (the parent is gone: stop, and leave nothing half-written)."""
    asked = sys.stdin.readline()
    reporter.orphaned = not asked
    reporter.stop.set()
    if asked:
        return
    finished.wait(_GRACE)
    _remove_staging(job)
    os._exit(1)


def _remove_staging(job: StageJob) -> None:
    staging = Path(job.staging) if job.staging is not None else None
    if staging is not None and staging.suffix == ".partial":
        shutil.rmtree(staging, ignore_errors=True)


def _ran_out_of_memory(message: str) -> bool:
    return any(text in message.lower() for text in _OUT_OF_MEMORY)


class _StoppedError(Exception):
    """The build was stopped because the parent asked for it."""


if __name__ == "__main__":
    main()
