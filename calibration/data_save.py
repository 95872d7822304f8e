"""Stage inputs kept in a file, with what they were made by: those of another checkpoint or processor are refused."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..errors import CalibrationError, InputError, OutputError
from .data_npz import CHECKPOINT_MARK, PROCESSOR_MARK, NpzFile
from .data_types import CalibrationData
from .feed import Progress, feed_stages


def marks_of(bundle: Bundle) -> dict[str, str]:
    """Mark -> SHA-256: of the checkpoint's files, and of all that makes tensors of pictures and prompts."""
    manifest = bundle.manifest
    processor = {
        name: None if part is None else part.model_dump(mode="json")
        for name, part in (
            ("image", manifest.image),
            ("video", manifest.video),
            ("prompt", manifest.prompt),
            ("score", manifest.score),
        )
    }
    # A placeholder is drawn anew by every export, and stands for the same token.
    for part in _parts(processor):
        part.pop("placeholder", None)
    return {CHECKPOINT_MARK: _digest(manifest.checkpoint.sha256), PROCESSOR_MARK: _digest(processor)}


def check_marks(file: Path, bundle: Bundle) -> None:
    """InputError for tensors that were made with another checkpoint or processor; a file without marks passes."""
    if file.suffix.lower() != ".npz":
        return
    with NpzFile(file) as archive:
        marks = archive.marks
    if not marks:
        return
    for mark, expected in marks_of(bundle).items():
        if (found := marks.get(mark, expected)) != expected:
            raise InputError(
                f"{file} was made with another {mark.split('/')[1]} (SHA-256 {found[:16]}) than {bundle.path} "
                f"({expected[:16]}); save the tensors again with this bundle, or calibrate with pictures"
            )


def check_name(path: str | Path) -> Path:
    """`path`; InputError for a name that does not end in `.npz`."""
    if Path(path).suffix.lower() != ".npz":
        raise InputError(f"{path} is no name for tensors; accepted is one that ends in .npz")
    return Path(path)


def save_stage_inputs(
    bundle: Bundle,
    data: CalibrationData,
    path: str | Path,
    stages: Sequence[str] = ("encoder",),
    *,
    progress: Progress | None = None,
) -> int:
    """Write the inputs of `stages` for `data` to the `.npz` file `path`, a row for each call; returns how many.

    The file carries the marks of `bundle`, so that `open_calibration` refuses it for another one. All rows are in
    memory at once. Raises CalibrationError for calls of different shapes or numbers, which are no rows of one array,
    InputError for a name that does not end in `.npz`, OutputError when the file cannot be written.
    """
    target = check_name(path)
    rows: dict[str, list[Any]] = {}
    for found in feed_stages(bundle, data, stages, progress=progress):
        for stage, calls in found.items():
            for call in calls:
                for name, array in call.items():
                    rows.setdefault(f"{stage}/{name}", []).append(array)
    if len({len(arrays) for arrays in rows.values()}) != 1:
        raise CalibrationError(f"{data.name}: {', '.join(stages)} are called differently often; save them one by one")
    for name, arrays in rows.items():
        if len({array.shape[1:] for array in arrays}) > 1:
            raise CalibrationError(
                f"{data.name}: {name} has a shape of its own for some pictures, and the rows of a file have one; "
                "calibrate with the pictures themselves"
            )
    whole = {name: np.concatenate(arrays) for name, arrays in rows.items()}
    _write(target, {**whole, **{mark: np.array(digest) for mark, digest in marks_of(bundle).items()}})
    return len(next(iter(whole.values())))


def _write(target: Path, arrays: dict[str, Any]) -> None:
    """Whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".save-") as folder:
            file = Path(folder) / target.name
            np.savez(file, **arrays)
            file.replace(target)
    except OSError as error:
        raise OutputError(f"{target} could not be written ({error.strerror or error}); choose another place") from error


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parts(content: Any) -> list[dict[str, Any]]:
    """All mappings in plain data."""
    if isinstance(content, dict):
        return [content, *(part for value in content.values() for part in _parts(value))]
    return [part for value in content for part in _parts(value)] if isinstance(content, list) else []
