"""The timing cache: kernel timings that builds share, one file per TensorRT, GPU and CUDA, safe for several builders.

A cache of another device or version is refused by TensorRT (or, told to ignore that, leads to wrong choices), so the
file's name holds all that it depends on. A build reads it at its start and merges what it measured at its end, under a
lock that is held for the merge alone. Another lock, on the device, is held for a whole build: timings that were taken
while another build ran would be wrong.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...engine_record import MachineRecord
from ...errors import OutputError

Combine = Callable[[list[bytes]], bytes]


def cache_directory() -> Path:
    """`BRIDGEPORT_CACHE`/tensorrt, else `bridgeport/tensorrt` in the user's cache directory (`~/.cache`)."""
    named = os.environ.get("BRIDGEPORT_CACHE")
    if named:
        return Path(named).expanduser() / "tensorrt"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "bridgeport" / "tensorrt"


def timing_cache_file(machine: MachineRecord, directory: Path | None = None) -> Path:
    """Where the timings of builds on this machine are kept; the file need not exist."""
    parts = ("timing", machine.tensorrt, machine.gpu, f"sm{machine.compute_capability}", f"cuda{machine.cuda}")
    name = "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", part) for part in parts)
    return (directory or cache_directory()) / f"{name}.cache"


def merge_timing_cache(file: Path, fresh: bytes, combine: Combine) -> None:
    """Put `fresh` into `file` beside what other builders wrote there since; the file is never half-written.

    `combine` makes one cache of several. A file that it refuses (damaged, or of another device) is replaced.
    Raises OutputError when the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_name(f"{file.name}.lock")):
            merged = fresh
            if file.is_file():
                with suppress(Exception):  # a cache is worth no failed build
                    merged = combine([file.read_bytes(), fresh])
            _write_atomically(file, merged)
    except OSError as error:
        raise OutputError(
            f"the timing cache {file} cannot be written ({error.strerror}); name another with --timing-cache, or none "
            "with --no-timing-cache"
        ) from error


@contextmanager
def device_lock(machine: MachineRecord, wait: Callable[[str], None], directory: Path | None = None) -> Iterator[None]:
    """Hold the device's lock; `wait` is told once when another build has it and this one waits for its end."""
    file = timing_cache_file(machine, directory).with_suffix(".build-lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise OutputError(
            f"{file} cannot be made ({error.strerror}); name another place with BRIDGEPORT_CACHE"
        ) from error
    with locked(file, lambda owner: wait(f"waiting for another build on this GPU (process {owner or 'unknown'})")):
        yield


@contextmanager
def locked(file: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock on `file`, which ends with this process at the latest. `wait` gets the owner's id."""
    import fcntl

    with file.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is not None:
                stream.seek(0)
                wait(stream.read().strip())
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def _write_atomically(file: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
