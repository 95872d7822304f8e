"""Calibration data from what a path holds: pictures with prompts, `.npz` tensors, or Polygraphy's JSON."""

from __future__ import annotations

from pathlib import Path

from ..bundle import Bundle
from ..errors import InputError
from .data_pictures import PROMPTS, is_picture, open_pictures, picture_files
from .data_tensors import open_tensors, tensor_files
from .data_types import CalibrationData, Inputs, Sample

__all__ = ["CalibrationData", "Inputs", "Sample", "open_calibration"]

_ACCEPTED = (
    f"accepted are a directory of pictures (with or without {PROMPTS}), and .npz or Polygraphy .json files of stage "
    "inputs, or a directory of those"
)


def open_calibration(
    path: str | Path, *, bundle: Bundle | None = None, seed: int = 0, limit: int | None = None, minimum: int = 8
) -> CalibrationData:
    """Open and check calibration data; every chosen file is read once here, and again by `samples`.

    `path`: a directory of pictures, subdirectories included, in which a file `prompts.jsonl` may add prompts (see
    `read_prompts`; a picture that it does not name is captioned); or stage inputs by name: a `.npz` file, a JSON file
    that `polygraphy run --save-inputs` wrote, or a directory of either (see `open_tensors`).
    `bundle`: whose stages tensors are checked against; pictures need none.
    `limit`: at most so many pictures (each with all its prompts) or samples of tensors, chosen by `seed`.
    `minimum`: fewer are refused.

    Raises InputError, one line: what came, what is accepted, and which files are bad.
    """
    root = Path(path)
    if limit is not None and limit < minimum:
        raise InputError(f"the limit is {limit}, but calibration needs at least {minimum} pictures; raise it")
    if root.is_file():
        return _open_file(root, bundle, seed, limit, minimum)
    if not root.is_dir():
        raise InputError(f"calibration data {root} does not exist; {_ACCEPTED}")
    try:
        pictures, tensors = picture_files(root), tensor_files(root)
    except OSError as error:
        raise InputError(f"{error.filename or root} may not be read ({error.strerror}); change its rights") from error
    if pictures and tensors:
        raise InputError(
            f"{root} holds pictures ({pictures[0].name}) and tensors ({tensors[0].name}); put them into directories of "
            "their own and give one"
        )
    if tensors:
        return open_tensors(root, tensors, bundle, seed=seed, limit=limit, minimum=minimum)
    if pictures or (root / PROMPTS).is_file():
        return open_pictures(root, pictures, seed=seed, limit=limit, minimum=minimum)
    what = "holds neither pictures nor tensors" if any(root.iterdir()) else "is empty"
    raise InputError(f"{root} {what}; {_ACCEPTED}")


def _open_file(path: Path, bundle: Bundle | None, seed: int, limit: int | None, minimum: int) -> CalibrationData:
    if tensor_files(path):
        return open_tensors(path, [path], bundle, seed=seed, limit=limit, minimum=minimum)
    if is_picture(path):
        raise InputError(f"{path} is one picture; give a directory with at least {minimum}")
    raise InputError(f"{path} is no calibration data; {_ACCEPTED}")
