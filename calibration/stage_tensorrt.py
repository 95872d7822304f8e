"""A stage that sees pictures in INT8 or FP8 for TensorRT: symmetric Q/DQ, FP16 with FP32 islands around."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from ..export.graph import save_graph
from ..manifest import QuantizationRecord, StageRecord
from .auto import MARGIN, FloatLayers, all_feeds, hold_aside
from .auto_tensorrt import choose_tensorrt_layers
from .compare import stage_difference
from .fp16 import ToFloat16, choose_float32_nodes, watched_values
from .job import Feed, Prepared, StageJob, finish_stage, pixel_readers, prepare, updated
from .placement import PlaceTensorRT, plan_tensorrt
from .placement.tensorrt import Placement
from .search import Keep

# What beside the products is quantised, from the fastest on: each step back is taken when the step before it costs too
# much. Massive tokens of a residual stream survive no INT8 scale, whatever is smoothed.
_PARTS: tuple[tuple[str, ...], ...] = (("attention", "residuals"), ("residuals",), ())
# How many calibration samples a step is tried on; the gate looks at others.
_TRIED_ON = 16


def quantize_for_tensorrt(job: StageJob) -> StageRecord:
    """Write the stage with Q/DQ where TensorRT has kernels; returns its record."""
    job, aside = hold_aside(job)
    model, layers = ir.load(job.graph), FloatLayers()
    kept = {**pixel_readers(model), **job.keep}
    plan = plan_tensorrt(model, precision=job.precision, keep=frozenset(kept))
    prepared = prepare(job, model, kept, (*plan.watch, *watched_values(model)))
    float32 = choose_float32_nodes(ir.load(job.graph), prepared.observations)
    with tempfile.TemporaryDirectory(dir=job.staging, prefix=".tensorrt-") as folder:
        graph = Path(folder) / "smoothed.onnx"
        save_graph(prepared.smoothed.model, graph)

        def build(parts: Sequence[str], keep: Keep = frozenset()) -> Placement:
            return _place(job, graph, prepared, float32, parts, keep)

        parts, placement = _step_back(job, build, aside)
        if job.options.auto:
            layers = choose_tensorrt_layers(
                job, graph, prepared.ranges, frozenset(kept), aside, lambda more: build(parts, more)
            )
            placement = build(parts, frozenset(layers.keep))
    return updated(job, _record(job, prepared, float32, parts, placement, layers), job.precision)


def _place(
    job: StageJob,
    graph: Path,
    prepared: Prepared,
    float32: Mapping[str, str],
    parts: Sequence[str],
    keep: Keep,
) -> Placement:
    """Write the stage of the smoothed `graph` with `parts` quantised beside the products, `keep` not in 8 bits and
    `float32` not even in FP16.
    """
    placement = PlaceTensorRT(
        prepared.ranges,
        precision=job.precision,
        keep=keep | prepared.kept.keys(),
        attention="attention" in parts,
        residuals="residuals" in parts,
    )
    finish_stage(job, ir.load(graph), [placement, ToFloat16(float32)])
    return placement.placement


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


def _record(
    job: StageJob,
    prepared: Prepared,
    float32: Mapping[str, str],
    parts: Sequence[str],
    placement: Placement,
    layers: FloatLayers,
) -> QuantizationRecord:
    return QuantizationRecord(
        scheme=f"qdq-{job.precision}",
        observer=job.options.observer,
        samples=prepared.observations.samples,
        observations=prepared.observations.key,
        smoothed=prepared.alphas,
        kept={**placement.left, **prepared.kept, **layers.keep},
        details={
            "half": True,
            "parts": ["products", *parts],
            "quantized": len(placement.quantized),
            "pairs": placement.pairs,
            "float32": dict(float32),
            **layers.details,
        },
    )
