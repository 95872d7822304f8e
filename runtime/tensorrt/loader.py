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


def try_plan(bundle: Bundle, stage: StageRecord, machine: MachineRecord) -> None:
    """Load the plan of a stage that `check_machine` let pass in a child process, unless one did so on this machine.

    Raises as `load_plan`. Try all stages before the first is loaded here: on a Jetson the child's plan and engine lie
    in the memory that this process needs too.
    """
    record = engine_record(bundle, stage)
    expected, host_code = _sha256_of(bundle, record), _needs_host_code(record)
    key = "\n".join((expected, str(host_code), machine.model_dump_json()))
    marker = trial_directory() / hashlib.sha256(key.encode()).hexdigest()
    if marker.is_file():
        return
    _read_plan(bundle, record)  # its hash; the bytes are not kept
    said = _run_trial([str(bundle.file(record.file)), expected, "host-code" if host_code else "plain"])
    if said is not None:
        raise EngineError(
            f"{bundle.path}: the engine of {stage.contract.name} does not load: {said}; build it again: "
            f"{record.rebuild_command(str(bundle.path))}"
        )
    with suppress(OSError):  # a cache that cannot be written costs time alone
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def load_plan(bundle: Bundle, stage: StageRecord, api: Api) -> LoadedEngine:
    """The engine of a stage that `check_machine` and `try_plan` let pass.

    Raises BundleIntegrityError when the plan is not the file that the bundle was verified with, EngineError when it
    does not load.
    """
    record = engine_record(bundle, stage)
    runtime = api.create_runtime(engine_host_code_allowed=_needs_host_code(record))
    engine = api.deserialize(runtime, _read_plan(bundle, record))
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


def _needs_host_code(record: EngineRecord) -> bool:
    """Whether the plan carries a lean runtime, which TensorRT runs only when it is allowed to."""
    return record.options.version_compatible and "EXCLUDE_LEAN_RUNTIME" not in record.flags


def _run_trial(arguments: list[str]) -> str | None:
    """None when the child loaded the plan, else how it ended."""
    command = [sys.executable, "-m", "bridgeport.runtime.tensorrt.trial", *arguments]
    # Modules of the working directory are not this process's either (from Python 3.11 on).
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    text: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
    try:
        done = subprocess.run(command, timeout=_TRIAL_SECONDS, check=False, env=environment, **text)
    except subprocess.TimeoutExpired:
        return f"a process that tried it was not done after {_TRIAL_SECONDS:.0f} seconds"
    if done.returncode == 0 and ANSWER in done.stdout.splitlines():
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode == -signal.SIGKILL:
        return "a process that tried it was killed (the machine's memory is used up: end others, or narrow --profile)"
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"a process that tried it was ended by {name} (the plan is damaged, or the driver is)"
    return lines[-1] if lines else f"a process that tried it ended with status {done.returncode}"


def _sha256_of(bundle: Bundle, record: EngineRecord) -> str:
    return next(one.sha256 for one in bundle.manifest.files if one.path == record.file)
