"""Attention: whether a fused kernel can take it, and what stands in the way.

Conditions: TensorRT developer guide, "Multi-head attention fusion", as quoted in NVIDIA/TensorRT issues 2981 and 4167
(FP16 and BF16: head sizes 16 to 256 in steps of 8); operators.md of 10.15 for the operator Attention. A kernel that
exists may still be declined after timing. Quantised attention is in the rules of Q/DQ.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ...calibration.placement.attention import Attention, find_attentions
from ...calibration.rules_graph import dtype_of, is_quantized, name_of
from . import tables
from .findings import Finding
from .subject import Subject

SMALLEST_HEAD, LARGEST_HEAD, HEAD_STEP = 16, 256, 8
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_HEADS = f"{SMALLEST_HEAD} to {LARGEST_HEAD} in steps of {HEAD_STEP}"


def check_written_out(subject: Subject) -> Iterator[Finding]:
    """Attention as matmul, softmax, matmul."""
    for one in find_attentions(subject.model):
        if any(is_quantized(value) for value in (*one.scores.inputs, *one.mix.inputs)):
            continue
        dtype = dtype_of(one.scores.outputs[0]) or dtype_of(one.scores.inputs[0])
        name = name_of(one.scores)
        reason = _unfused(one)
        if dtype == ir.DataType.FLOAT:
            why = "attention in FP32 has no fused kernel" + (
                f"; in FP16 there would be none either: {reason}" if reason else ""
            )
            yield subject.finding("fused-attention", "note", name, why, "convert to FP16 (--precision fp16)")
        elif dtype in _HALF and reason is not None:
            why = f"no fused attention kernel: {reason}"
            yield subject.finding("fused-attention", "warning", name, why, _fix(one))
        elif dtype in _HALF:
            why = f"the conditions of fused attention are met (head size {one.head_size})"
            yield subject.finding("fused-attention", "note", name, why, "look for _gemm_mha in the engine's layers")


def check_operator(subject: Subject) -> Iterator[Finding]:
    """The operator Attention: it is not taken apart when no fused kernel fits, so the build fails."""
    if tables.operator_status("Attention", subject.version) != "accepted":
        return
    for node in subject.standard("Attention"):
        reason = _operator_unfused(node)
        if reason is not None:
            why = f"Attention, and {reason}: without a fused kernel the build fails"
            fix = "let it be taken apart (polygraphy --decomposable-attentions), or export at opset 20"
            yield subject.finding("fused-attention", "warning", name_of(node), why, fix)
        if (mask := node.inputs[3] if len(node.inputs) > 3 else None) is not None and _is_narrow(mask, node.inputs[0]):
            why = "the mask has one row for all queries, and this axis is not said to be broadcast (unverified)"
            yield subject.finding("attention-mask", "warning", name_of(node), why, "expand the mask to [B, 1, Sq, Skv]")


def _unfused(one: Attention) -> str | None:
    if one.guards:
        kinds = ", ".join(sorted({node.op_type for node in one.guards}))
        return f"{kinds} between softmax and the second matmul"
    if any(len(set(node.uses())) > 1 or node.is_graph_output() for node in one.softmax.outputs):
        return "its probabilities are read by something else too"
    return _head_reason(one.head_size)


def _operator_unfused(node: ir.Node) -> str | None:
    dtype = dtype_of(node.inputs[0])
    if dtype == ir.DataType.FLOAT:
        return "FP32 has no fused kernel"
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or len(shape) != 4:
        return None
    size = shape[-1]
    return _head_reason(size if isinstance(size, int) else None)


def _head_reason(size: int | None) -> str | None:
    if size is None:
        return "the head size is not fixed in the graph"
    if size % HEAD_STEP or not SMALLEST_HEAD <= size <= LARGEST_HEAD:
        return f"head size {size} has no fused kernel ({_HEADS} have)"
    return None


def _fix(one: Attention) -> str:
    if one.guards:
        return "export with attn_implementation='eager' and a mask of -1e4, which needs no guard against NaN"
    if _head_reason(one.head_size) is not None:
        return f"pad the heads to one of {_HEADS}, or leave it: the matmuls run apart"
    return "build the graph without this reader, or leave it: the matmuls run apart"


def _is_narrow(mask: ir.Value, query: ir.Value | None) -> bool:
    if mask.shape is None or len(mask.shape) < 2 or mask.shape[-2] != 1:
        return False
    return query is None or query.shape is None or query.shape[-2] != 1
