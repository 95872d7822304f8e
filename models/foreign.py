"""Checkpoints in the files of other projects: found by the file that says so, read as a model of transformers' kind.

A reader takes a directory apart and gives what `load_checkpoint` needs of it: the `config.json` that transformers
would have written, and the weights under transformers' names. One record per project in `READERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from ..errors import CheckpointError, UnsupportedError
from .contract import Record
from .weights import Weights

if TYPE_CHECKING:
    from .checkpoint import VisionLanguageModel

CONFIG = "config.json"
SUFFIXES = (".safetensors", ".pth")


@dataclass(frozen=True)
class ForeignCheckpoint:
    """What a reader found. No weight is in memory.

    `project`: one of `READERS`' values or of `MODEL_TYPES`' ("lavis", "minigpt4", "qwen_vl"). `config`: the content of
    the `config.json` that transformers would write for this model. `weights`: under transformers' names. `files`: what
    beside the weights tells one checkpoint from another.
    """

    project: str
    config: dict[str, Any]
    weights: Weights
    files: tuple[Path, ...]


Reader = Callable[..., ForeignCheckpoint]

# The file that makes a directory one of another project -> the sibling module that reads it.
READERS: Mapping[str, str] = {
    "lavis.json": "lavis",
    "lavis.safetensors": "lavis",
    "lavis.pth": "lavis",
    "minigpt4.json": "minigpt4",
}


# The same by `model_type` of its config.json, for models that no class of transformers has.
MODEL_TYPES: Mapping[str, str] = {"qwen": "qwen_vl"}


def project(directory: Path) -> str | None:
    """The project that wrote `directory`; None when it holds none of the files in `READERS` and no config.json of a
    type in `MODEL_TYPES`.

    Raises CheckpointError when its files are those of two projects.
    """
    found = {READERS[name]: name for name in READERS if (directory / name).is_file()}
    if len(found) > 1:
        raise CheckpointError(f"{directory} holds {' and '.join(found.values())}, which are of two projects; keep one")
    return next(iter(found), None) or _project_of_config(directory / CONFIG)


def _project_of_config(file: Path) -> str | None:
    try:
        raw = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None  # whoever reads it next says what is wrong
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    return MODEL_TYPES.get(kind) if isinstance(kind, str) else None


def find(directory: Path) -> Reader | None:
    """The reader `(directory, *, allow_pickle) -> ForeignCheckpoint` for `directory`; None for transformers' own."""
    name = project(directory)
    if name is None:
        return None
    reader: Reader = import_module(f".{name}", __package__).read
    return reader


def find_config(directory: Path) -> dict[str, Any] | None:
    """The `config.json` that transformers would write for `directory`; None for transformers' own.

    Where the project's reader has a `read_config`, no weights need be there.
    """
    name = project(directory)
    if name is None:
        return None
    reader = import_module(f".{name}", __package__)
    if hasattr(reader, "read_config"):
        config: dict[str, Any] = reader.read_config(directory)
        return config
    found: ForeignCheckpoint = reader.read(directory)
    return found.config


def transformers_model(checkpoint: VisionLanguageModel) -> Any:
    """The whole model as transformers' own class with the converted weights: the reference of such a checkpoint."""
    import torch
    import transformers

    from .language import finish_language_model

    make: Any = getattr(transformers, checkpoint.architecture)
    with torch.device("meta"):
        model: Any = make._from_config(checkpoint.config, attn_implementation="eager")
    weights = checkpoint.weights
    tensors = weights.read(name for name in weights.entries if not checkpoint.layout.ignores(name))
    result = model.load_state_dict(tensors, strict=False, assign=True)
    unread = set(result.missing_keys) - set(checkpoint.layout.tied)
    if unread or result.unexpected_keys:
        names = sorted(unread | set(result.unexpected_keys))
        raise CheckpointError(f"{checkpoint.path}: transformers' {checkpoint.architecture} does not take {names[:4]}")
    if getattr(model, "language_model", None) is not None:
        finish_language_model(model.language_model)
    return model.eval().requires_grad_(False)


P = TypeVar("P", bound=Record)


def read_parts(file: Path, kind: type[P]) -> P:
    """The record `kind` from `file`, its defaults when there is no such file.

    Raises CheckpointError for what is no JSON object, an unknown key or a value of the wrong type.
    """
    if not file.is_file():
        return kind()
    raw = read_json(file)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{file}: {key}: {first['msg']} (got {first['input']!r}); known keys are {', '.join(kind.model_fields)}"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError."""
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds a JSON {type(raw).__name__}, not an object; correct it")
    return raw


def part_file(directory: Path, named: str | None, stem: str, *, what: str, listing: str) -> Path:
    """Where the part `what` lies: the file that `listing` names, else `stem` with one of `SUFFIXES`.

    Raises CheckpointError when there is none.
    """
    if named is not None:
        file = directory / named
        if not file.is_file():
            raise CheckpointError(f"{directory / listing} names {named} as {what}, but there is no such file; copy it")
        return file
    candidates = [directory / f"{stem}{suffix}" for suffix in SUFFIXES]
    for file in candidates:
        if file.is_file():
            return file
    names = " nor ".join(file.name for file in candidates)
    raise CheckpointError(f"{directory} has no {what}: neither {names}; copy it there, or name it in {listing}")


def language_model_directory(directory: Path, named: str | None, default: str, *, listing: str) -> Path:
    """The language model's directory, as transformers writes it. Raises CheckpointError when there is none."""
    path = directory / (named or default)
    if not (path / CONFIG).is_file():
        source = f"named in {listing}" if named is not None else f"or name another in {listing}"
        raise CheckpointError(
            f"{directory} has no language model: {path} has no {CONFIG} ({source}); copy the directory of the "
            "language model there, as transformers writes it"
        )
    return path


def language_model_config(path: Path) -> dict[str, Any]:
    """`config.json` of a language model. Raises UnsupportedError when it is quantised."""
    raw = read_json(path / CONFIG)
    if raw.get("quantization_config"):
        raise UnsupportedError(
            f"{path / CONFIG}: the language model is quantised (quantization_config); give one stored in float32, "
            "float16 or bfloat16, and quantise on export"
        )
    return raw
