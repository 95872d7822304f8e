"""The stages of a language model in another precision: its weights alone are rounded, or all of it computes in FP16."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..export.passes.standard_decoder import write_standard_decoder
from ..manifest import QuantizationRecord, StageRecord
from .fp16 import ToFloat16, choose_float32_nodes, watched_values
from .job import StageJob, finish_stage, updated
from .weight_only import quantize_weights
from .weight_only.generated import generation_inputs

_BITS = {"int8": 8, "int4": 4}


def quantize_language(job: StageJob) -> StageRecord:
    """Write `llm`, `llm_encoder` or `cross_kv` in `job.precision`; returns its record.

    For TensorRT the decoder is rewritten to standard operators, with a cache that grows by concatenation.
    """
    target = job.options.target
    with tempfile.TemporaryDirectory(dir=job.staging, prefix=".llm-") as folder:
        work = Path(folder)
        rewritten = target == "tensorrt" and job.name == "llm"  # the others have no cache of their own
        graph, details = _standard(job, work) if rewritten else (job.graph, {})
        kept: dict[str, str] = {}
        # Before the weights are rounded: what is observed are FP32's activations.
        half = job.precision == "fp16" or (target != "cpu" and job.precision != "fp32")
        float32 = _float32_nodes(job, graph) if half else {}
        if job.precision in _BITS:
            rounded = _round_weights(job, graph, work / "rounded.onnx")
            kept, graph = rounded.pop("kept"), work / "rounded.onnx"
            details |= rounded
        if half:
            details |= _half(job, graph, float32)
            kept |= float32
        else:
            _save(ir.load(graph), job)
    scheme = f"nbits-{details['bits']}-{details['method']}" if "bits" in details else job.precision
    return updated(job, QuantizationRecord(scheme=scheme, kept=kept, details=details), job.precision)


def _standard(job: StageJob, work: Path) -> tuple[Path, dict[str, Any]]:
    """The graph in operators that TensorRT reads."""
    graph = work / "standard.onnx"
    write_standard_decoder(job.graph, graph)
    return graph, {"concatenated": True}


def _float32_nodes(job: StageJob, graph: Path) -> Mapping[str, str]:
    """Nodes whose FP32 values do not fit FP16 -> why."""
    model = ir.load(graph)
    # A prefill's cache is empty: there is nothing in it to observe.
    empty = _cache_names(job, model)
    observations = job.observe([name for name in watched_values(model) if name not in empty], graph=graph)
    return choose_float32_nodes(model, observations)


def _round_weights(job: StageJob, graph: Path, out: Path) -> dict[str, Any]:
    gptq = job.options.weights == "gptq" and job.precision == "int4"
    samples = None
    if gptq:
        job.say(f"{job.name}: writing texts to fit the weights to")
        samples = list(generation_inputs(job.source, job.data))
    names = {node.name for node in ir.load(graph).graph}
    return quantize_weights(
        graph,
        out,
        bits=_BITS[job.precision],
        method="gptq" if gptq else "rtn",
        target=job.options.target,
        inputs=samples,
        keep=frozenset(job.keep) & names,
    )


def _half(job: StageJob, graph: Path, float32: Mapping[str, str]) -> dict[str, Any]:
    """FP16 around the products, the cache in FP16 too."""
    model = ir.load(graph)
    names = {node.name for node in model.graph}
    half = ToFloat16({name: why for name, why in float32.items() if name in names}, half_io=_cache_names(job, model))
    finish_stage(job, model, [half])
    return {"half": True, "nodes": half.report.half, "casts": half.report.casts}


def _save(model: ir.Model, job: StageJob) -> None:
    finish_stage(job, model, [])


def _cache_names(job: StageJob, model: ir.Model) -> frozenset[str]:
    """The cache's inputs and outputs, which become FP16 with what computes them."""
    contract = {spec.name for spec in (*job.record.contract.inputs, *job.record.contract.outputs)}
    ends = {value.name or "" for value in (*model.graph.inputs, *model.graph.outputs)}
    return frozenset(ends - contract)
