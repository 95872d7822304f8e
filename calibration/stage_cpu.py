"""A stage that sees pictures in the INT8 scheme that this machine's CPU runs fastest."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import onnx_ir as ir

from ..errors import CalibrationError
from ..export.graph import save_graph
from ..export.passes.gemm import MatMulFromGemm
from ..manifest import QuantizationRecord, StageRecord
from .auto import FloatLayers, hold_aside
from .auto_cpu import choose_cpu_layers
from .cpu import SAMPLES, CpuChoice, choose_scheme
from .job import Prepared, StageJob, finish_stage, pixel_readers, prepare, updated
from .placement.cpu import CPU_SCHEMES, PlaceCpu, watch_cpu
from .placement.patterns import infer_types


def quantize_for_cpu(job: StageJob) -> StageRecord:
    """Write the stage in the INT8 scheme that `job.options.engine` runs fastest; returns its record.

    Its speed hint is in the record's `details["speed_hint"]`. Raises what `choose_scheme` does, and CalibrationError
    for data that does not call the stage.
    """
    job, aside = hold_aside(job)
    model = ir.load(job.graph)
    infer_types(model)
    kept = {**pixel_readers(model), **job.keep}
    prepared = prepare(job, model, kept, watch_cpu(model))
    inputs = [dict(feed) for feed in itertools.islice(job.feeds(), SAMPLES)]
    if not inputs:
        raise CalibrationError(f"{job.data.name}: these samples never call the stage {job.name}; add some that do")
    with tempfile.TemporaryDirectory(dir=job.staging, prefix=".cpu-") as folder:
        work, layers = Path(folder), FloatLayers()
        graph = work / "smoothed.onnx"
        save_graph(prepared.smoothed.model, graph)

        def choose(keep: frozenset[str], schemes: Sequence[str] | None = None) -> CpuChoice:
            return choose_scheme(
                job.graph,
                inputs,
                prepared.ranges,
                work,
                graph=graph,
                keep=keep,
                schemes=schemes,
                engine=job.options.engine,
                min_cosine=job.min_cosine,
                say=lambda text: job.say(f"{job.name}: {text}"),
            )

        choice = choose(frozenset(kept))
        if job.options.auto:
            layers, choice = choose_cpu_layers(
                job, graph, prepared.ranges, choice, choose, frozenset(kept), aside, work
            )
        placement = _place(job, graph, prepared, choice, frozenset(kept) | layers.keep.keys())
    return updated(job, _record(job, prepared, choice, placement, layers), "int8")


def _place(job: StageJob, graph: Path, prepared: Prepared, choice: CpuChoice, keep: frozenset[str]) -> PlaceCpu:
    """Write the stage of the smoothed `graph` in the scheme of `choice`, `keep` in float."""
    placement = PlaceCpu(choice.scheme, prepared.ranges, keep=keep, weight_bits=choice.weight_bits)
    model = ir.load(graph)
    infer_types(model)
    finish_stage(job, model, [MatMulFromGemm(), placement])
    return placement


def _record(
    job: StageJob, prepared: Prepared, choice: CpuChoice, placement: PlaceCpu, layers: FloatLayers
) -> QuantizationRecord:
    return QuantizationRecord(
        scheme=choice.scheme,
        observer=job.options.observer if CPU_SCHEMES[choice.scheme].needs_ranges else None,
        samples=prepared.observations.samples,
        observations=prepared.observations.key,
        smoothed=prepared.alphas,
        kept={**(placement.placement.left or {}), **prepared.kept, **layers.keep},
        details={
            "quantized": len(placement.placement.quantized),
            "fused_attention": len(placement.placement.fused),
            "weight_bits": choice.weight_bits,
            "candidates": [asdict(one) for one in choice.candidates],
            "speed_hint": choice.hint().model_dump(mode="json"),
            **layers.details,
        },
    )
