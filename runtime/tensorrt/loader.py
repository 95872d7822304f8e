"""Plans to engines, guarded: nothing is deserialised before hashes, machine and GPU hold, and first in a child process.

A plan is executable code, and what is wrong with one shows as a crash rather than as an error. So the file's bytes are
hashed as they are read, the record is compared with this machine, the driver is asked for a GPU before TensorRT is
(without one its lean runtime crashes the process), and a child loads the plan first; what it managed is remembered.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...bundle import Bundle
from ...engine_record import EngineRecord, MachineRecord, check_engine
from ...errors import BundleIntegrityError, EngineError
from ...manifest import StageRecord
from .api import Api
from .machine import cuda_of_wheel, find_machine
from .trial import ANSWER

_TRIAL_SECONDS = 600.0


@dataclass(frozen=True)
class LoadedEngine:
    """A deserialised engine with what it was loaded by; the runtime must live as long as the engine."""

    record: EngineRecord
    engine: Any
    runtime: Any


def find_local_machine(api: Api) -> MachineRecord:
    """This machine with its TensorRT. DependencyError without a driver that is new enough, UnsupportedError without a
    GPU; no runtime is made for it.
    """
    return find_machine(str(api.version), cuda_major=cuda_of_wheel())


def engine_record(bundle: Bundle, stage: StageRecord) -> EngineRecord:
    """The stage's record. EngineError for a stage that has no engine."""
    record = stage.engine
    if record is None:
        raise EngineError(
            f"{bundle.path}: stage {stage.contract.name} has no TensorRT engine; build one with "
            f"`bridgeport build {bundle.path} -o NEW`, or use the engine onnxruntime"
        )
    return record


def check_machine(bundle: Bundle, stage: StageRecord, machine: MachineRecord) -> None:
    """EngineError, with the command that builds it here, unless the stage's engine is made for this machine."""
    found = check_engine(engine_record(bundle, stage), machine, str(bundle.path))
    if found:
        more = "" if len(found) == 1 else f" (and {len(found) - 1} more: {', '.join(one.what for one in found[1:])})"
        raise EngineError(f"{bundle.path}: {stage.contract.name}: {found[0].as_text()}{more}")


def load_plan(bundle: Bundle, stage: StageRecord, api: Api, machine: MachineRecord) -> LoadedEngine:
    """The engine of a stage that `check_machine` let pass.

    Raises BundleIntegrityError when the plan is not the file that the bundle was verified with, EngineError when it
    does not load.
    """
    record = engine_record(bundle, stage)
    plan = _read_plan(bundle, record)
    host_code = record.options.version_compatible and "EXCLUDE_LEAN_RUNTIME" not in record.flags
    _try_plan(bundle, stage, machine, host_code=host_code)
    runtime = api.create_runtime(engine_host_code_allowed=host_code)
    engine = api.deserialize(runtime, plan)
    if record.options.strip:
        api.refit(engine, bundle.graph(stage.contract.name))
    if record.options.weight_streaming:
        api.set_weight_streaming_budget(engine)  # before any context is made
    return LoadedEngine(record, engine, runtime)


def trial_directory() -> Path:
    """Where it is remembered which plans loaded in a child: beside the timing caches."""
    named, home = os.environ.get("BRIDGEPORT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named).expanduser() / "tensorrt" / "loaded"
    return (Path(home) if home else Path.home() / ".cache") / "bridgeport" / "tensorrt" / "loaded"


def _read_plan(bundle: Bundle, record: EngineRecord) -> bytes:
    """The bytes that are hashed are those that are deserialised, whatever happens to the file meanwhile."""
    plan, expected = bundle.file(record.file).read_bytes(), _sha256_of(bundle, record)
    if hashlib.sha256(plan).hexdigest() != expected:
        raise BundleIntegrityError(
            f"{bundle.file(record.file)} was changed since the bundle was verified; do not use it, build it again"
        )
    return plan


def _try_plan(bundle: Bundle, stage: StageRecord, machine: MachineRecord, *, host_code: bool) -> None:
    """EngineError unless a child process can load the plan. One that it could is not tried again on this machine."""
    record = engine_record(bundle, stage)
    expected = _sha256_of(bundle, record)
    key = "\n".join((expected, str(host_code), machine.model_dump_json()))
    marker = trial_directory() / hashlib.sha256(key.encode()).hexdigest()
    if marker.is_file():
        return
    said = _run_trial([str(bundle.file(record.file)), expected, "host-code" if host_code else "plain"])
    if said is not None:
        raise EngineError(
            f"{bundle.path}: the engine of {stage.contract.name} does not load: {said}; build it again: "
            f"{record.rebuild_command(str(bundle.path))}"
        )
    with suppress(OSError):  # a cache that cannot be written costs time alone
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def _run_trial(arguments: list[str]) -> str | None:
    """None when the child loaded the plan, else how it ended."""
    command = [sys.executable, "-m", "bridgeport.runtime.tensorrt.trial", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"a process that tried it was not done after {_TRIAL_SECONDS:.0f} seconds"
    if done.returncode == 0 and done.stdout.strip().endswith(ANSWER):
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"a process that tried it was ended by {name} (the plan is damaged, or the driver is)"
    return lines[-1] if lines else f"a process that tried it ended with status {done.returncode}"


def _sha256_of(bundle: Bundle, record: EngineRecord) -> str:
    return next(one.sha256 for one in bundle.manifest.files if one.path == record.file)
