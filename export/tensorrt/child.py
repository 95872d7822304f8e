"""The parent's side of a stage's build: start the child, pass its progress on, and tell how it ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO, Any

from ... import errors
from ...errors import BridgeportError, EngineError
from .job import BuildEvent, StageJob, StageResult

Progress = Callable[[BuildEvent], None]
# Seconds that a build has to come to its next step after Ctrl-C, and then to end after SIGTERM.
_STOP, _END = 20.0, 5.0
_LOWER = (
    "lower the largest sizes (--profile 'batch=1,1,1'), then --workspace and --tactic-dram (MiB), then "
    "--optimization-level; end what else uses the memory of the device"
)


def run_child(job: StageJob, progress: Progress) -> StageResult:
    """Build one stage in a process of its own.

    Ctrl-C (or any exception of `progress`) stops the build at its next step, waits for the child, and goes on.
    Raises what the child's error says, and EngineError for a child that died.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise:
        child = _start(noise)
        try:
            answer, last = _follow(child, job, progress)
            status = child.wait()
        except BaseException:
            _stop(child)
            raise
        finally:
            _close(child)
        if answer is None:
            raise _died(job, status, last, noise)
    if answer["event"] == "done":
        return _result(answer)
    raise _error(job, answer)


def _follow(child: subprocess.Popen[str], job: StageJob, progress: Progress) -> tuple[dict[str, Any] | None, str]:
    """(the child's last word, None if it died without one; the phase that it was in)."""
    last = "its start"
    for event in _talk(child, job):
        if event["event"] in ("done", "error"):
            return event, last
        last = event.get("phase") or last
        _pass_on(job, event, progress)
    return None, last


def _start(noise: IO[str]) -> subprocess.Popen[str]:
    # A session of its own: Ctrl-C of the terminal reaches the parent alone, which stops the child in order.
    return subprocess.Popen(
        [sys.executable, "-m", "bridgeport.export.tensorrt.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=noise,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )


def _talk(child: subprocess.Popen[str], job: StageJob) -> Iterator[dict[str, Any]]:
    """Send the job; the child's answers until it ends."""
    if child.stdin is None or child.stdout is None:
        raise EngineError(f"{job.stage}: the process that builds it has no pipes; try again")
    with suppress(BrokenPipeError):  # it died at once; its status tells how
        child.stdin.write(job.to_line())
        child.stdin.flush()
    for line in child.stdout:
        yield json.loads(line)


def _pass_on(job: StageJob, event: dict[str, Any], progress: Progress) -> None:
    kind = event.pop("event")
    if kind in ("phase", "step", "finish", "note"):
        progress(BuildEvent(kind, job.stage, **event))


def _result(event: dict[str, Any]) -> StageResult:
    return StageResult(tuple(event["flags"]), event["size"], event["seconds"], tuple(event["warnings"]))


def _error(job: StageJob, event: dict[str, Any]) -> Exception:
    if event["kind"] == "OSError":
        return OSError(event["errno"], event["message"], event["file"])
    if event["kind"] == "MemoryError":
        return EngineError(f"{job.stage}: out of memory in the build ({event['message']}); {_LOWER}")
    kind = getattr(errors, event["kind"], EngineError)
    message = event["message"]
    if not message.startswith(job.stage):
        message = f"{job.stage}: {message}"
    error: BridgeportError = kind(message)
    return error


def _died(job: StageJob, status: int, last: str, noise: IO[str]) -> EngineError:
    """What to tell of a child that gave no answer."""
    noise.seek(0)
    lines = [line.strip() for line in noise.read().splitlines() if line.strip()]
    said = f"; it said last: {lines[-1]}" if lines else ""
    if status == -signal.SIGKILL:
        return EngineError(
            f"{job.stage}: the build was killed during {last}, most likely because the machine ran out of memory; "
            f"{_LOWER}"
        )
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    hint = f"read {job.log}" if job.log else "build again with --log FILE"
    return EngineError(f"{job.stage}: the build ended {how} during {last}{said}; {hint}")


def _stop(child: subprocess.Popen[str]) -> None:
    """Ask the build to stop, then insist."""
    if child.poll() is not None:
        return
    with suppress(OSError, ValueError):
        if child.stdin is not None:
            child.stdin.write(json.dumps({"stop": True}) + "\n")
            child.stdin.flush()
    try:
        _drain(child, _STOP)
    except subprocess.TimeoutExpired:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            _drain(child, _END)
    finally:  # also when Ctrl-C comes a second time
        if child.poll() is None:
            child.kill()
            child.wait()


def _drain(child: subprocess.Popen[str], seconds: float) -> None:
    """Wait for the end, reading what still comes: a full pipe would hold the child back."""
    child.communicate(timeout=seconds)


def _close(child: subprocess.Popen[str]) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
