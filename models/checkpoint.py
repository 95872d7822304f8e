"""Trained checkpoints: a directory as transformers writes it, read stage by stage."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError, UnsupportedError
from .contract import KvCacheContract, StageContract
from .families import FAMILIES, Family
from .foreign import find, find_config
from .registry import KEY, replace_connector
from .remote_code import read_config_with_code, refuse_remote_code
from .weights import Weights, open_weights

if TYPE_CHECKING:
    from torch import nn

    from .stages import Layout

CONFIG = "config.json"


@dataclass(eq=False)
class VisionLanguageModel:
    """A checkpoint whose config and weights fit each other. Make one with `load_checkpoint`.

    `path`: its directory. `kind`: "blip-2" or "blip-2-retrieval". `architecture`: transformers' class name.
    `config`: the transformers config. No weight is in memory until a stage is asked for.
    """

    path: Path
    architecture: str
    config: Any
    layout: Layout
    weights: Weights
    described_by: tuple[Path, ...]

    @property
    def kind(self) -> str:
        """Which chain of stages this is."""
        return self.layout.kind

    @property
    def contracts(self) -> dict[str, StageContract]:
        """The contract of each stage, in the order of the chain."""
        return self.layout.contracts

    @property
    def kv_cache(self) -> KvCacheContract | None:
        """The language model's cache; None where there is no language model."""
        return self.layout.kv_cache

    @property
    def text_config(self) -> Any:
        """The language model's part of `config`; None where there is no language model."""
        return self.layout.text_config

    @property
    def files(self) -> tuple[Path, ...]:
        """config.json (or what stands for it) and the weight files: what tells one checkpoint from another."""
        return (*self.described_by, *self.weights.files)

    def relative_path(self, file: Path) -> str:
        """The name of one of `files`, as a manifest keeps it: its POSIX path from the checkpoint's directory."""
        return Path(os.path.relpath(file, self.path)).as_posix()

    def load_stage(self, name: str) -> nn.Module:
        """A new module of the stage `name`, FP32, eval mode, without gradients.

        Only this stage's tensors are read. FP32 weights are mapped from the files, so the checkpoint must
        stay where it is while the module is used. Raises KeyError for a stage that `contracts` does not have.
        """
        return self.layout.load(name, self.weights)

    @cached_property
    def encoder(self) -> nn.Module:
        """The vision encoder: `[B, 3, H, W]` to `[B, N, Dv]`."""
        return self.load_stage("encoder")

    @cached_property
    def connector(self) -> nn.Module:
        """The connector: `[B, N, Dv]` to `[B, Q, D]`."""
        return self.load_stage("connector")

    @cached_property
    def embed_tokens(self) -> nn.Module:
        """The embedding of token ids: `[B, L]` to `[B, L, D]`."""
        return self.load_stage("embed_tokens")

    @cached_property
    def language_model(self) -> nn.Module:
        """transformers' causal language model."""
        return self.load_stage("llm")


def load_checkpoint(path: str | Path, *, allow_pickle: bool = False) -> VisionLanguageModel:
    """Open the checkpoint directory at `path` and check it whole, without reading a weight.

    `allow_pickle`: also take pickle weights, which are read with `weights_only=True`.

    A `bridgeport_connector` in config.json stands in the place of the architecture's own connector: see `registry`.

    Raises CheckpointError when it is no checkpoint, of an unknown kind, incomplete or corrupt, or when config
    and weights disagree (naming the tensor and both shapes); UnsupportedError for a known kind not built yet, and
    for one that comes with code of its own, unless that is allowed (`remote_code.remote_code`).
    """
    directory = Path(path)
    reader = find(directory)
    foreign = None if reader is None else reader(directory, allow_pickle=allow_pickle)
    raw = _read_config(directory) if foreign is None else foreign.config
    family, architecture = _find_family(directory, raw)
    raw = raw if foreign is not None else read_config_with_code(directory, raw)
    config = _make_config(directory, raw, family)
    layout = _lay_out(directory, family, architecture, config, raw.get(KEY))
    stored = open_weights(directory, allow_pickle=allow_pickle) if foreign is None else foreign.weights
    weights = layout.canonical(stored)
    with _blame_config(f"{directory}: "):
        layout.check(weights, str(directory))
    described_by = (directory / CONFIG,) if foreign is None else foreign.files
    return VisionLanguageModel(directory, architecture, config, layout, weights, described_by)


def read_layout(path: str | Path) -> tuple[Any, Layout]:
    """The transformers config of the checkpoint directory at `path`, and its stages; no weights need be there.

    Raises what `load_checkpoint` does for a directory without a config, or with one that cannot be used.
    """
    directory = Path(path)
    foreign = find_config(directory)
    raw = _read_config(directory) if foreign is None else foreign
    family, architecture = _find_family(directory, raw)
    raw = raw if foreign is not None else read_config_with_code(directory, raw)
    config = _make_config(directory, raw, family)
    return config, _lay_out(directory, family, architecture, config, raw.get(KEY))


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(
            f"{directory} {what}; a checkpoint is a local directory with {CONFIG}, weights, tokenizer and processor"
        )
    file = directory / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{directory} is no checkpoint: it has no {CONFIG}; name a directory that has one")
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); copy the checkpoint again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds a JSON {type(raw).__name__}, not an object; copy the checkpoint again")
    return raw


def _find_family(directory: Path, raw: dict[str, Any]) -> tuple[Family, str]:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        own = "; code that comes with a checkpoint gives no model" if raw.get("auto_map") else ""
        raise CheckpointError(
            f"{directory / CONFIG}: model_type {model_type!r} is unknown; known are {', '.join(FAMILIES)}{own}"
        )
    refuse_remote_code(str(directory / CONFIG), raw)
    family = FAMILIES[model_type]
    architectures = raw.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or name not in family.layouts:
        raise CheckpointError(
            f"{directory / CONFIG}: architecture {name!r} is unknown for {model_type}; known are "
            f"{', '.join(family.layouts)}"
        )
    if raw.get("quantization_config"):
        raise UnsupportedError(
            f"{directory / CONFIG}: the checkpoint is quantised (quantization_config); give one stored in "
            "float32, float16 or bfloat16, and quantise on export"
        )
    return family, name


def _make_config(directory: Path, raw: dict[str, Any], family: Family) -> Any:
    try:
        config = family.config_type().from_dict(copy.deepcopy(raw))  # it writes into what it gets
    except Exception as error:
        # transformers validates with exceptions of several libraries; each means that the file is wrong.
        _refuse_unknown_parts(directory, raw, family)
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 200 else f"{reason[:197]}..."
        raise CheckpointError(f"{directory / CONFIG} is not a valid config ({reason}); correct it") from error
    _check_vision_tower(directory, raw, config)
    return config


def _refuse_unknown_parts(directory: Path, raw: dict[str, Any], family: Family) -> None:
    """UnsupportedError for a tower or language model that transformers has no class for, with what is supported here;
    transformers' own message lists all that it has. Only of parts that the family's config leaves open."""
    from transformers import CONFIG_MAPPING, AutoConfig

    from .language import TEXT_MODELS
    from .vision_tower import VISION_TOWERS

    parts = {"vision_config": ("the vision tower", VISION_TOWERS), "text_config": ("the language model", TEXT_MODELS)}
    kinds = getattr(family.config_type(), "sub_configs", {})
    for part, (what, supported) in parts.items():
        named = raw[part].get("model_type") if isinstance(raw.get(part), dict) else None
        if kinds.get(part) is AutoConfig and isinstance(named, str) and named not in CONFIG_MAPPING:
            raise UnsupportedError(f"{directory / CONFIG}: {what} is a {named!r}; supported are {', '.join(supported)}")


def _check_vision_tower(directory: Path, raw: dict[str, Any], config: Any) -> None:
    """transformers builds a family's own vision tower whatever config.json names; say so instead of misreading it."""
    part = raw.get("vision_config")
    named = part.get("model_type") if isinstance(part, dict) else None
    built = getattr(type(getattr(config, "vision_config", None)), "model_type", None)
    if not isinstance(named, str) or not isinstance(built, str):
        return
    family: str = raw["model_type"].replace("-", "_")
    if not (named.startswith((family, built)) or built.startswith(named)):
        raise UnsupportedError(
            f"{directory / CONFIG}: the vision tower is a {named!r}; supported is {built!r}, the only one that a "
            f"{raw['model_type']} model has"
        )


def _lay_out(directory: Path, family: Family, architecture: str, config: Any, connector: Any) -> Layout:
    """`connector`: what config.json names in the place of the architecture's own, None for nothing."""
    try:
        with _blame_config():
            layout = family.layout(architecture)(config)
        return layout if connector is None else replace_connector(layout, connector, architecture, config)
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(f"{directory}: {error}") from error


@contextmanager
def _blame_config(where: str = "") -> Iterator[None]:
    """CheckpointError for values of config.json of which torch and transformers make no module, or a part here."""
    try:
        yield
    except InputError as error:
        raise CheckpointError(f"{where}config.json: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{where}config.json describes a model that cannot be built ({type(error).__name__}: {reason}); correct "
            "the value, or give a checkpoint of a model that is read"
        ) from error
