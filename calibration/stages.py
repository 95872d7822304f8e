"""One stage of a bundle to another precision: observed, smoothed, placed for its target, checked and saved."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from ..bundle import Bundle, sha256
from ..errors import CalibrationError
from ..export.attention_variant import write_attention_variant
from ..export.graph import save_graph
from ..export.options import toolchain
from ..export.passes import GraphPass, apply_passes
from ..manifest import Precision, QuantizationRecord, StageRecord
from .auto import MARGIN, FloatLayers, all_feeds, hold_aside
from .auto_tensorrt import choose_tensorrt_layers
from .cache import cache_directory
from .collect import collect
from .compare import stage_difference
from .data_types import CalibrationData
from .feed import stage_inputs, with_empty_cache
from .fp16 import ToFloat16, choose_float32_nodes, watched_values
from .gate import StageVerdict
from .language import quantize_language
from .linears import find_linears
from .observers import ObserverSettings
from .options import QuantizeOptions
from .placement import PlaceTensorRT, plan_tensorrt
from .placement.tensorrt import Placement
from .plan import LANGUAGE_STAGES, LOOKUP_STAGES
from .records import Observations
from .smooth import Smoothing, smooth, values_to_watch

Feed = Mapping[str, NDArray[Any]]
# What beside the products is quantised, from the fastest on: each step back is taken when the step before it costs too
# much. Massive tokens of a residual stream survive no INT8 scale, whatever is smoothed.
_PARTS: tuple[tuple[str, ...], ...] = (("attention", "residuals"), ("residuals",), ())
# How many calibration samples a step is tried on; the gate looks at others.
_TRIED_ON = 16
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


def quantize_stage(job: StageJob) -> StageRecord:
    """Write the stage in its new precision below the staging directory; returns its record.

    Raises CalibrationError when the data never calls the stage, or for activations that no range can be made of.
    """
    rewritten = job.options.target == "tensorrt" and job.name == "llm"
    if job.precision == job.record.precision and not rewritten:
        return _copy(job)
    job.say(f"{job.name}: quantising to {job.precision} for {job.options.target}")
    if job.name in LOOKUP_STAGES:
        return _half(job, Observations("", 0))
    if job.name in LANGUAGE_STAGES:
        return quantize_language(job)
    if not any(True for _ in job.feeds()):
        raise CalibrationError(
            f"{job.data.name}: these pictures never call the stage {job.name}; add some that do (videos, say), or "
            f"leave it alone with --stage {job.name}=fp32"
        )
    if job.precision == "fp16" or job.options.target == "cuda":
        return _half(job, job.observe(watched_values(ir.load(job.graph))))
    if job.options.target == "cpu":
        from .cpu import quantize_for_cpu

        if all(one.op_type == "Conv" for one in find_linears(ir.load(job.graph))):
            job.say(f"{job.name}: has no matrix product that a CPU computes in INT8, and stays as it is")
            return _copy(job)

        return quantize_for_cpu(job, engine=job.options.engine)
    return _tensorrt(job)


def _copy(job: StageJob) -> StageRecord:
    for file in (job.record.file, *job.record.variants.values()):
        for path in (file, f"{file}.data"):
            if (job.source.path / path).is_file():
                (job.staging / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(job.source.path / path, job.staging / path)
    return job.record


def _half(job: StageJob, observations: Observations) -> StageRecord:
    """FP16 with FP32 islands. INT8 for CUDA comes here too: its provider has no INT8 kernels for Q/DQ graphs."""
    model = ir.load(job.graph)
    keep = {**choose_float32_nodes(model, observations), **job.keep} if observations.tensors else dict(job.keep)
    half = ToFloat16(keep)
    finish_stage(job, model, [half])
    record = QuantizationRecord(
        scheme="fp16",
        samples=observations.samples,
        observations=observations.key or None,
        kept={name: why for name, why in half.report.float32.items() if name in keep},
        details={"half": True, "nodes": half.report.half, "casts": half.report.casts},
    )
    return updated(job, record, "fp16")


def _tensorrt(job: StageJob) -> StageRecord:
    """Symmetric Q/DQ where TensorRT has kernels, FP16 with FP32 islands around."""
    job, aside = hold_aside(job)
    float_model = ir.load(job.graph)
    kept = {**pixel_readers(float_model), **job.keep}
    plan = plan_tensorrt(float_model, precision=job.precision, keep=frozenset(kept))
    watch = dict.fromkeys((*plan.watch, *values_to_watch(float_model), *watched_values(float_model)))
    observations = job.observe(tuple(watch))
    float32 = choose_float32_nodes(float_model, observations)
    smoothed = smooth(float_model, observations, observer=job.options.observer, settings=job.settings)
    ranges = smoothed.observations.ranges(job.options.observer)
    layers = FloatLayers()
    with tempfile.TemporaryDirectory(dir=job.staging, prefix=".tensorrt-") as folder:
        graph = Path(folder) / "smoothed.onnx"
        save_graph(smoothed.model, graph)

        def build(parts: Sequence[str], keep: frozenset[str] = frozenset()) -> Placement:
            placement = PlaceTensorRT(
                ranges,
                precision=job.precision,
                keep=keep | kept.keys(),
                attention="attention" in parts,
                residuals="residuals" in parts,
            )
            finish_stage(job, ir.load(graph), [placement, ToFloat16(float32)])
            return placement.placement

        parts, placement = _step_back(job, build, aside)
        if job.options.auto:
            layers = choose_tensorrt_layers(job, graph, ranges, frozenset(kept), aside, partial(build, parts))
            placement = build(parts, frozenset(layers.keep))
    record = QuantizationRecord(
        scheme=f"qdq-{job.precision}",
        observer=job.options.observer,
        samples=observations.samples,
        observations=observations.key,
        smoothed=alphas(smoothed),
        kept={**placement.left, **kept, **layers.keep},
        details={
            "half": True,
            "parts": ["products", *parts],
            "quantized": len(placement.quantized),
            "pairs": placement.pairs,
            "float32": dict(float32),
            **layers.details,
        },
    )
    return updated(job, record, job.precision)


def _step_back(
    job: StageJob, build: Callable[[Sequence[str]], Placement], aside: Sequence[Feed]
) -> tuple[Sequence[str], Placement]:
    """The first of `_PARTS` that keeps the cosine, with a margin for unseen pictures, else the last, built.

    Mixed precision looks at more pictures, and has added the margin.
    """
    least = job.min_cosine if job.options.auto else job.min_cosine + MARGIN * (1.0 - job.min_cosine)
    tried_on = list(all_feeds(job, aside) if job.options.auto else itertools.islice(job.feeds(), _TRIED_ON))
    for parts in _PARTS:
        placement = build(parts)
        cosine = stage_difference(job.graph, job.out, tried_on).min_token_cosine
        what = " and ".join(("products", *parts))
        job.say(f"{job.name}: {what} in {job.precision}: worst token's cosine {cosine:.4f}")
        if cosine >= least:
            break
    return parts, placement


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


def alphas(smoothed: Smoothing) -> dict[str, float]:
    """Value -> alpha, of the groups that were smoothed."""
    return {name: alpha for name, alpha in smoothed.alphas.items() if alpha is not None}


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


def blame_layer(verdict: StageVerdict, source: Bundle, candidate: Bundle, held_out: CalibrationData) -> StageVerdict:
    """The verdict with the layer at which the error grows most."""
    from .compare import blame, compare_graphs

    calls = stage_inputs(source, held_out, verdict.stage)
    if verdict.stage in LANGUAGE_STAGES:
        return verdict
    worst = blame(
        compare_graphs(source.graph(verdict.stage), candidate.graph(verdict.stage), itertools.islice(calls, 2))
    )
    return verdict if worst is None else replace(verdict, blame=worst.layer)
