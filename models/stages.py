"""How a checkpoint falls apart into stages: which module each is, which stored tensor fills which weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from .contract import KvCacheContract, StageContract
from .reduction_contract import Reduction
from .weights import FLOAT_DTYPES, TensorEntry, Weights

# Sizes of the dynamic axes and a source of randomness -> inputs that the stage can really get.
ExampleInputs = Callable[[Mapping[str, int], torch.Generator], dict[str, torch.Tensor]]


def _nothing(module: nn.Module) -> None:
    """For a stage whose module is complete once its weights are in."""


@dataclass(frozen=True)
class Stage:
    """One stage's module, before its weights are read.

    `build` makes the module; it runs on the meta device, so it costs no memory. `checkpoint_name` takes a
    name of the module's `state_dict` to the name in the checkpoint. `finish` makes, on the CPU, what is not
    stored (say rotary frequencies). `examples`: for a stage whose inputs may not be any numbers of their type.
    `vectors`: parameters of the module that its `forward` leaves to the run time ("image_newline").
    """

    build: Callable[[], nn.Module]
    checkpoint_name: Callable[[str], str]
    finish: Callable[[nn.Module], None] = _nothing
    examples: ExampleInputs | None = None
    vectors: tuple[str, ...] = ()

    def on_meta(self) -> nn.Module:
        """The module without weights."""
        with torch.device("meta"):
            return self.build()


@dataclass(frozen=True)
class Layout:
    """A checkpoint in stages.

    `text_config`: the language model's part of the transformers config. `ignored`: names of stored tensors that no
    stage reads, because they hold nothing learned or nothing that the architecture uses; a name that ends in "*"
    stands for all that begin so. `tied`: tensor -> the tensor that it equals and that may stand in for it. `renames`:
    patterns and replacements, tried in order on every stored name until one matches, that bring the names of older
    releases to those that the stages use.
    """

    kind: str
    stages: Mapping[str, Stage]
    contracts: dict[str, StageContract]
    kv_cache: KvCacheContract | None = None
    text_config: Any = None
    ignored: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    # What of it is not as the checkpoint's architecture has it: see `reduction` and `registry`.
    reduction: Reduction | None = None
    custom_connector: str | None = None

    def canonical_name(self, name: str) -> str:
        """The stored tensor `name` as the stages call it."""
        return _rename(name, self.renames)

    def canonical(self, weights: Weights) -> Weights:
        """`weights` under the names that the stages use."""
        return RenamedWeights(weights, self.renames) if self.renames else weights

    def ignores(self, name: str) -> bool:
        """Whether no stage reads the stored tensor `name`, and rightly so."""
        starts = tuple(pattern[:-1] for pattern in self.ignored if pattern.endswith("*"))
        return name in self.ignored or (bool(starts) and name.startswith(starts))

    def check(self, weights: Weights, where: str) -> None:
        """Hold the headers of `weights` against the modules: names, shapes, dtypes; no tensor is read.

        Raises CheckpointError that names the tensor, and both shapes where they differ.
        """
        expected = self._expected()
        for name, shape in expected.items():
            if name not in weights.entries and name not in self.tied:
                raise CheckpointError(
                    f"{where}: tensor {name} of shape {list(shape)} is missing"
                    f"{_and_more(set(expected) - set(weights.entries) - set(self.tied))}; "
                    "config.json asks for it, so the weights are of another model or not whole"
                )
        for name, entry in weights.entries.items():
            if name not in expected and self.ignores(name):
                continue
            if name not in expected:
                unknown = {other for other in weights.entries if other not in expected and not self.ignores(other)}
                raise CheckpointError(
                    f"{entry.file}: tensor {name} of shape {list(entry.shape)} has no place in the model"
                    f"{_and_more(unknown)}; config.json and weights are of different models"
                )
            if entry.shape != expected[name]:
                raise CheckpointError(
                    f"{entry.file}: tensor {name} has shape {list(entry.shape)}, but config.json asks for "
                    f"{list(expected[name])}; they are of different models"
                )
            if entry.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{entry.file}: tensor {name} is stored as {entry.dtype}; accepted are "
                    f"{', '.join(FLOAT_DTYPES)}, so save the checkpoint in one of these"
                )

    def load(self, name: str, weights: Weights) -> nn.Module:
        """The stage `name` with its weights in FP32, in eval mode; reads no tensor of any other stage.

        Raises CheckpointError when two tensors that config.json ties are both stored and differ.
        """
        stage = self.stages[name]
        module = stage.on_meta()
        sources = {key: stage.checkpoint_name(key) for key in module.state_dict()}
        present = {source for source in sources.values() if source in weights.entries}
        stand_ins = {self.tied[source] for source in sources.values() if source not in present}
        tensors = weights.read(sorted(present | stand_ins))
        for tied, source in self.tied.items():
            if tied in present and source in tensors:
                if not torch.equal(tensors[tied], tensors[source]):
                    raise CheckpointError(
                        f"{weights.entries[tied].file}: config.json ties {tied} to {source}, but the two are "
                        "stored and differ; set tie_word_embeddings to false in text_config if that is meant"
                    )
                tensors[tied] = tensors[source]
        state = {key: tensors[source if source in tensors else self.tied[source]] for key, source in sources.items()}
        module.load_state_dict(state, assign=True)
        stage.finish(module)
        return module.eval().requires_grad_(False)

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Name in the checkpoint -> shape, over all stages."""
        expected = {}
        for stage in self.stages.values():
            for key, tensor in stage.on_meta().state_dict().items():
                expected[stage.checkpoint_name(key)] = tuple(tensor.shape)
        return expected


class RenamedWeights:
    """Weights under other names. Raises CheckpointError when two stored tensors come to one name."""

    def __init__(self, weights: Weights, renames: tuple[tuple[str, str], ...]) -> None:
        self._weights = weights
        self.files: tuple[Path, ...] = weights.files
        self._stored: dict[str, str] = {}
        for stored in weights.entries:
            name = _rename(stored, renames)
            if name in self._stored:
                raise CheckpointError(
                    f"{weights.entries[stored].file}: the tensors {self._stored[name]} and {stored} are two names of "
                    f"one weight ({name}); save the checkpoint again"
                )
            self._stored[name] = stored
        self.entries: Mapping[str, TensorEntry] = {
            name: weights.entries[stored] for name, stored in self._stored.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """See `Weights.read`."""
        wanted = list(names)
        tensors = self._weights.read(self._stored[name] for name in wanted)
        return {name: tensors[self._stored[name]] for name in wanted}


def _rename(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def _and_more(names: set[str]) -> str:
    """ ", and 3 more" when `names` holds four."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
