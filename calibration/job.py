"""One stage of a bundle on its way to another precision: what it is made of, and how its graph and record are kept."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from ..bundle import Bundle, sha256
from ..export.attention_variant import write_attention_variant
from ..export.graph import save_graph
from ..export.options import toolchain
from ..export.passes import GraphPass, apply_passes
from ..manifest import Precision, QuantizationRecord, StageRecord
from .cache import cache_directory
from .collect import collect
from .data_types import CalibrationData
from .feed import stage_inputs, with_empty_cache
from .linears import find_linears
from .observers import ObserverSettings
from .options import QuantizeOptions
from .records import Observations, TensorRange
from .smooth import Smoothing, smooth, values_to_watch

Feed = Mapping[str, NDArray[Any]]
_MOVES = frozenset({"Reshape", "Transpose", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten"})


@dataclass(frozen=True)
class StageJob:
    """One stage to be quantised. `data`: what calibrates. `keep`: nodes that stay in the base precision -> why."""

    source: Bundle
    staging: Path
    record: StageRecord
    precision: Precision
    options: QuantizeOptions
    data: CalibrationData
    say: Callable[[str], None]
    keep: Mapping[str, str]
    min_cosine: float

    @property
    def settings(self) -> ObserverSettings:
        """Of the observers that run."""
        return ObserverSettings(observers=tuple(dict.fromkeys(("minmax", self.options.observer))))

    @property
    def name(self) -> str:
        """Of the stage."""
        return self.record.contract.name

    @property
    def graph(self) -> Path:
        """The FP32 graph."""
        return self.source.graph(self.name)

    @property
    def out(self) -> Path:
        """Where the quantised graph goes."""
        return self.staging / self.record.file

    def feeds(self, start: int = 0, *, concatenated: bool = False) -> Iterator[Feed]:
        """The stage's inputs for the calibration data, from the `start`-th call on; a cache is given empty.

        ``concatenated``: in the form of a decoder of standard operators.
        """
        cache = self.source.manifest.kv_cache if self.name == "llm" else None
        if cache is not None and concatenated:
            cache = cache.model_copy(update={"shared_buffer": False})
        calls = stage_inputs(self.source, self.data, self.name)
        return (with_empty_cache(cache, one) for one in itertools.islice(calls, start, None))

    def observe(self, watch: Sequence[str], *, graph: Path | None = None) -> Observations:
        """One pass over the calibration data; from the cache where it was made before.

        ``graph``: another FP32 form of the stage, a decoder of standard operators.
        """

        def progress(done: int, total: int) -> None:
            self.say(f"{self.name}: observing activations, {done} of {total}")

        other = graph is not None and graph != self.graph
        return collect(
            graph or self.graph,
            partial(self.feeds, concatenated=other),
            watch,
            key=f"{self.data.sha256} {sha256(self.source.path / 'manifest.json')} {self.name}",
            samples=self.data.pictures,
            settings=self.settings,
            cache=self.options.cache or cache_directory(),
            progress=progress,
        )


def copy_stage(job: StageJob) -> StageRecord:
    """Take the stage over as it is."""
    for file in (job.record.file, *job.record.variants.values()):
        for path in (file, f"{file}.data"):
            if (job.source.path / path).is_file():
                (job.staging / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(job.source.path / path, job.staging / path)
    return job.record


def finish_stage(job: StageJob, model: ir.Model, passes: Iterable[GraphPass]) -> None:
    """Apply the passes, save the graph, and make its variants over the same weights."""
    model, _ = apply_passes(model, tuple(passes), stage=job.name)
    save_graph(model, job.out)
    for purpose, file in job.record.variants.items():
        if purpose == "attention":
            write_attention_variant(job.out, job.staging / file)


def updated(job: StageJob, quantization: QuantizationRecord, precision: Precision) -> StageRecord:
    """The stage's record with what was made of it."""
    opset = ir.load(job.out).graph.opset_imports[""]
    return job.record.model_copy(
        update={
            "precision": precision,
            "opset": opset,
            "quantization": quantization,
            "toolchain": {**job.record.toolchain, **toolchain()},
        }
    )


@dataclass(frozen=True)
class Prepared:
    """What is known of a stage before anything is placed.

    `kept`: nodes that stay in float -> why. `ranges`: of the smoothed graph's activations.
    """

    kept: Mapping[str, str]
    observations: Observations
    smoothed: Smoothing
    ranges: Mapping[str, TensorRange]

    @property
    def alphas(self) -> dict[str, float]:
        """Value -> alpha, of the groups that were smoothed."""
        return {name: alpha for name, alpha in self.smoothed.alphas.items() if alpha is not None}


def prepare(job: StageJob, model: ir.Model, kept: Mapping[str, str], watch: Sequence[str]) -> Prepared:
    """Observe `watch`, and what smoothing needs, then smooth `model`, the job's FP32 graph, in place."""
    observations = job.observe(tuple(dict.fromkeys((*watch, *values_to_watch(model)))))
    smoothed = smooth(model, observations, observer=job.options.observer, settings=job.settings)
    return Prepared(kept, observations, smoothed, smoothed.observations.ranges(job.options.observer))


def pixel_readers(model: ir.Model) -> dict[str, str]:
    """Products that read the stage's pixels, and why they stay in float: 2 % of a ViT's work, and its worst layer.

    On the shipped model a patch of one colour behind an INT8 patch embedding had a cosine of 0.924.
    """
    pixels = {value.name for value in model.graph.inputs if value.name in ("pixel_values", "pixel_values_videos")}
    return {one.node: "it reads pixels" for one in find_linears(model) if _origin(model, one.node) in pixels}


def _origin(model: ir.Model, node: str) -> str | None:
    """The value that a product reads, behind what only moves or casts it."""
    found = next(one for one in model.graph if one.name == node)
    value = found.inputs[0]
    while value is not None and (maker := value.producer()) is not None and maker.op_type in _MOVES:
        value = maker.inputs[0]
    return None if value is None else value.name
