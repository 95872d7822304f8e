"""Observations on disk, by the content that they were made of.

A file is an `.npz` without pickles that is written beside its place and renamed, and that carries the SHA-256 of its
own arrays: one that is cut or altered is dropped with a note and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..bundle import sha256
from .observers import ObserverSettings
from .records import Observations, TensorRange, TensorStats

Arrays = dict[str, NDArray[Any]]
Result = TypeVar("Result")

# Part of every key: observations that an earlier way of observing made are not found any more.
_FORMAT = 1
_META, _DIGEST = "meta", "digest"
_CHANNEL_FIELDS = ("channel_min", "channel_max", "rows")
# Of all files together: 350 MB for a ViT-L with 512 rows of each of its 97 activations.
_LIMIT_BYTES = 4 << 30
_STALE_SECONDS = 24 * 3600
# What numpy raises for an .npz that is cut, altered or something else.
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def cache_directory() -> Path:
    """Where observations are kept: `BRIDGEPORT_CACHE`, else the user's cache directory (`~/.cache/bridgeport`)."""
    named = os.environ.get("BRIDGEPORT_CACHE")
    if named:
        return Path(named).expanduser() / "calibration"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "bridgeport" / "calibration"


def observation_key(graph: Path, data: str, samples: int, watch: Sequence[str], settings: ObserverSettings) -> str:
    """SHA-256 over all that observations depend on.

    That is the graph's file and its external data, `data` (which names the inputs), the watched values, the settings
    and the libraries that compute.
    """
    import onnx
    import onnxruntime

    model = onnx.load(str(graph), load_external_data=False)
    places = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location" and tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    content = {
        "format": _FORMAT,
        "graph": sha256(graph),
        "weights": {place: sha256(graph.parent / place) for place in sorted(places)},
        "data": data,
        "samples": samples,
        "watch": sorted(set(watch)),
        "settings": settings.to_dict(),
        "versions": {"numpy": np.__version__, "onnxruntime": onnxruntime.__version__},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class ObservationCache:
    """The files of one key in `directory`: the finished observations, and the state of an unfinished run.

    A cache that cannot be read or written costs time and never the run: `note` gets one line about it.
    """

    def __init__(self, directory: Path, key: str, note: Callable[[str], None]) -> None:
        self.finished = directory / f"{key}.npz"
        self.unfinished = directory / f"{key}.partial.npz"
        self._key = key
        self._note = note

    def load(self) -> Observations | None:
        """The finished observations, None where there are none that can be trusted."""
        found = self._read(self.finished, lambda arrays, meta: _observations(self._key, arrays, meta))
        if found is not None:
            with contextlib.suppress(OSError):
                self.finished.touch()  # used just now, so pruned last
        return found

    def save(self, observations: Observations) -> None:
        """Keep finished observations; what was kept of the unfinished run goes."""
        self._write(self.finished, *_as_arrays(observations))
        with contextlib.suppress(OSError):
            self.unfinished.unlink(missing_ok=True)
            prune_cache(self.finished.parent, keep=self.finished)

    def load_state(self) -> tuple[Arrays, Any] | None:
        """Arrays and plain data of `save_state`, None where there are none that can be trusted."""
        return self._read(self.unfinished, lambda arrays, meta: (arrays, meta))

    def save_state(self, arrays: Mapping[str, NDArray[Any]], meta: Any) -> None:
        """Keep the state of a run that is not done."""
        self._write(self.unfinished, arrays, meta)

    def _read(self, file: Path, convert: Callable[[Arrays, Any], Result]) -> Result | None:
        if not file.exists():
            return None
        try:
            return convert(*read_arrays(file))
        except _UNREADABLE as error:
            self._note(f"{file} is corrupt ({error or type(error).__name__}); it was dropped and is made again")
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            return None

    def _write(self, file: Path, arrays: Mapping[str, NDArray[Any]], meta: Any) -> None:
        try:
            write_arrays(file, arrays, meta)
        except OSError as error:
            self._note(f"{file} could not be written ({error.strerror or error}); calibration goes on without a cache")


def prune_cache(directory: Path, *, keep: Path, limit: int = _LIMIT_BYTES) -> None:
    """Remove the files used longest ago until `directory` has at most `limit` bytes, but not `keep`.

    Halves of files that a killed process left go after a day. Raises OSError when a file cannot be removed.
    """
    now = time.time()
    for file in directory.glob(".*.tmp"):
        if now - file.stat().st_mtime > _STALE_SECONDS:
            file.unlink(missing_ok=True)
    files = sorted(directory.glob("*.npz"), key=lambda file: (file == keep, file.stat().st_mtime), reverse=True)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > limit and file != keep:
            file.unlink(missing_ok=True)


def write_arrays(file: Path, arrays: Mapping[str, NDArray[Any]], meta: Any) -> None:
    """Write `arrays` and `meta` (plain data) to `file`, whole or not at all. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = dict(arrays) | {_META: np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)}
    content[_DIGEST] = _digest(content)
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as target:
            np.savez(target, **content)  # type: ignore[arg-type]  # numpy's stub takes the names for its option
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def read_arrays(file: Path) -> tuple[Arrays, Any]:
    """What `write_arrays` wrote. Raises one of `_UNREADABLE` for anything else."""
    with file.open("rb") as source, np.load(source, allow_pickle=False) as archive:
        content = {name: archive[name] for name in archive.files}
    digest = content.pop(_DIGEST)
    if not np.array_equal(digest, _digest(content)):
        raise ValueError("its SHA-256 is not that of its content")
    return content, json.loads(content.pop(_META).tobytes())


def _digest(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def _as_arrays(observations: Observations) -> tuple[Arrays, Any]:
    arrays: Arrays = {}
    tensors = {}
    for index, (name, stats) in enumerate(observations.tensors.items()):
        ranges = {observer: asdict(one) for observer, one in stats.ranges.items()}
        tensors[name] = {"minimum": stats.minimum, "maximum": stats.maximum, "ranges": ranges}
        for field in _CHANNEL_FIELDS:
            value = getattr(stats, field)
            if value is not None:
                arrays[f"{index}.{field}"] = value
    return arrays, {"samples": observations.samples, "tensors": tensors}


def _observations(key: str, arrays: Arrays, meta: Any) -> Observations:
    tensors = {
        name: TensorStats(
            minimum=entry["minimum"],
            maximum=entry["maximum"],
            ranges={observer: TensorRange(**one) for observer, one in entry["ranges"].items()},
            **{field: arrays.get(f"{index}.{field}") for field in _CHANNEL_FIELDS},
        )
        for index, (name, entry) in enumerate(meta["tensors"].items())
    }
    return Observations(key, meta["samples"], tensors)
