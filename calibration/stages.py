"""A stage of a bundle to another precision, by what it is and what it is for."""

from __future__ import annotations

import onnx_ir as ir

from ..errors import CalibrationError, CheckFailed
from ..manifest import QuantizationRecord, StageRecord
from .fp16 import ToFloat16, choose_float32_nodes, watched_values
from .job import StageJob, copy_stage, finish_stage, updated
from .language import quantize_language
from .linears import find_linears
from .plan import LANGUAGE_STAGES, LOOKUP_STAGES
from .records import Observations
from .rules import check_rules
from .stage_cpu import quantize_for_cpu
from .stage_tensorrt import quantize_for_tensorrt


def quantize_stage(job: StageJob) -> StageRecord:
    """Write the stage in its new precision below the staging directory; returns its record.

    Raises CalibrationError when the data never calls the stage, or for activations that no range can be made of, and
    CheckFailed for a graph for TensorRT that breaks one of its rules.
    """
    record = _write(job)
    if job.options.target == "tensorrt" and record is not job.record:
        _check_rules(job)
    return record


def _write(job: StageJob) -> StageRecord:
    rewritten = job.options.target == "tensorrt" and job.name == "llm"
    if job.precision == job.record.precision and not rewritten:
        return copy_stage(job)
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
        if all(one.op_type == "Conv" for one in find_linears(ir.load(job.graph))):
            job.say(f"{job.name}: has no matrix product that a CPU computes in INT8, and stays as it is")
            return copy_stage(job)
        return quantize_for_cpu(job)
    return quantize_for_tensorrt(job)


def _check_rules(job: StageJob) -> None:
    """The graph as it was written, FP16 and all; each pass has looked at its own work alone."""
    found = check_rules(job.out, precision=job.precision, weight_only=job.name in LANGUAGE_STAGES)
    broken = [one for one in found if one.severity == "error"]
    if broken:
        raise CheckFailed(f"stage {job.name}: {broken[0].as_text()} ({len(broken)} errors in all)")


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
