"""Constants that FP16 does not hold, and masks made of them.

A mask of -inf or of the smallest float gives NaN for a row that is masked as a whole, and the smallest FP32 number is
-inf in FP16. -1e4 is an exact 0 behind the softmax in every precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...calibration.placement.patterns import MOVES
from ...calibration.rules_graph import dtype_of, name_of
from .findings import Finding
from .subject import STANDARD, Subject

FP16_MAX = 65504.0
# FP16's smallest number and scores of a few tens sum to -inf; masks at or below this are reported in FP16.
FP16_MASK = -60000.0
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_PIECE = 1 << 22
# Operators that hand a mask's numbers on to the softmax.
_CARRIERS = MOVES | {"Add", "Sub", "Mul", "Where", "Expand", "Tile", "Concat", "Slice", "Gather", "GatherND", "Trilu"}
_CARRIERS |= {"ScatterND", "Cast", "CastLike", "Min", "Max"}
_MOST_CARRIERS = 500
MASK_FIX = "write the mask with -1e4, which is 0 behind the softmax in every precision"


@dataclass(frozen=True)
class Constant:
    """A tensor of an initializer or of a Constant node, and the value that it is read through."""

    name: str
    value: ir.Value
    tensor: ir.TensorProtocol


@dataclass(frozen=True)
class Role:
    """Where a constant's numbers go: into a softmax, and through a cast to FP16."""

    masks: bool
    cast_to_fp16: bool


def check_constants(subject: Subject) -> Iterator[Finding]:
    """Every float constant is finite and within FP16. Reads one after the other, and those of other files in pieces."""
    for one in constants_of(subject.model):
        if one.tensor.dtype not in _FLOATS or one.tensor.size == 0 or _bounds_only(one.value):
            continue
        low, high = _range(one.tensor)
        if np.isnan(low) or np.isnan(high):
            why = "it holds NaN"
            yield subject.finding("constant", "error", one.name, why, "repair the checkpoint, or export again")
            continue
        yield from _check_range(subject, one, low, high)


def _check_range(subject: Subject, one: Constant, low: float, high: float) -> Iterator[Finding]:
    in_fp16 = one.tensor.dtype == ir.DataType.FLOAT16
    beyond = low < -FP16_MAX or high > FP16_MAX
    if not beyond and not (in_fp16 and low <= FP16_MASK):
        return
    role = role_of(one.value)
    if low <= FP16_MASK and role.masks:
        yield _mask(subject, one, low, in_fp16=in_fp16, cast=role.cast_to_fp16)
    elif beyond:
        largest = high if high > -low else low
        fatal = in_fp16 or role.cast_to_fp16
        where = "becomes infinite in FP16, where the graph computes" if fatal else "is infinite once cast to FP16"
        yield subject.finding(
            "constant",
            "error" if fatal else "warning",
            one.name,
            f"{largest:.6g} {where} (the largest there is {FP16_MAX:.0f})",
            "keep what reads it in FP32 (--precision fp16 does), or use BF16",
        )


def _mask(subject: Subject, one: Constant, low: float, *, in_fp16: bool, cast: bool) -> Finding:
    shown = "-inf" if np.isinf(low) else f"{low:.6g}"
    if np.isinf(low) or low < -FP16_MAX:
        fatal = in_fp16 or cast or subject.computes_in_fp16
        why = f"a mask of {shown}: -inf in FP16, and NaN for a row that is masked as a whole"
    else:
        fatal = False
        why = f"a mask of {shown}: the sum with a negative score, or with a second mask, is -inf in FP16"
    return subject.finding("mask", "error" if fatal else "warning", one.name, why, MASK_FIX, fixable=True)


def constants_of(model: ir.Model) -> Iterator[Constant]:
    """Those of the graph, its subgraphs and functions."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield Constant(name, value, value.const_value)
        for node in graph:
            for attribute in node.attributes.values():
                tensor = _tensor_of(attribute)
                if tensor is not None and node.domain in STANDARD:
                    yield Constant(name_of(node), node.outputs[0], tensor)


def _tensor_of(attribute: ir.Attr) -> ir.TensorProtocol | None:
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor()
    if attribute.name == "value_float":
        return ir.tensor(np.array([attribute.as_float()], np.float32))
    if attribute.name == "value_floats":
        return ir.tensor(np.array(attribute.as_floats(), np.float32))
    return None


def _range(tensor: ir.TensorProtocol) -> tuple[float, float]:
    """Least and largest number; NaN when there is one."""
    lows, highs = [], []
    for piece in _pieces(tensor):
        if tensor.dtype == ir.DataType.BFLOAT16:
            piece = piece.astype(np.float32)
        lows.append(float(piece.min()))
        highs.append(float(piece.max()))
    return float(np.min(lows)), float(np.max(highs))


def _pieces(tensor: ir.TensorProtocol) -> Iterator[NDArray[Any]]:
    """The numbers in pieces; those of another file are read and not mapped, so that no piece stays in memory."""
    if not isinstance(tensor, ir.ExternalTensor):
        yield tensor.numpy().reshape(-1)
        return
    dtype = np.dtype(tensor.dtype.numpy()).newbyteorder("<")
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset or 0)
        for start in range(0, tensor.size, _PIECE):
            count = min(_PIECE, tensor.size - start)
            yield np.frombuffer(file.read(count * dtype.itemsize), dtype)


def _bounds_only(value: ir.Value) -> bool:
    """Whether only Clip reads it, as a bound: an infinite bound bounds nothing."""
    uses = list(value.uses())
    return bool(uses) and all(node.op_type == "Clip" and index > 0 for node, index in uses)


def role_of(value: ir.Value) -> Role:
    """Where the numbers of `value` end, followed through operators that hand them on."""
    masks = cast = False
    queue, seen = [value], {id(value)}
    while queue and len(seen) < _MOST_CARRIERS:
        for node, index in queue.pop().uses():
            if node.domain not in STANDARD:
                continue
            if node.op_type in ("Softmax", "LogSoftmax") or (node.op_type == "Attention" and index == 3):
                masks = True
                cast = cast or dtype_of(node.inputs[index]) == ir.DataType.FLOAT16
            elif node.op_type in _CARRIERS:
                cast = cast or (node.op_type == "Cast" and dtype_of(node.outputs[0]) == ir.DataType.FLOAT16)
                for output in node.outputs:
                    if id(output) not in seen:
                        seen.add(id(output))
                        queue.append(output)
    return Role(masks, cast)
