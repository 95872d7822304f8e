"""Rules about the numbers of a quantiser: type, zero point, scale, axis, blocks.

Source: `IQuantizeLayer` and `IDequantizeLayer` of TensorRT's `NvInfer.h`, and what its ONNX parser accepts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from .placement.patterns import PRODUCTS, is_standard, readers
from .placement.plan import weight_axis
from .rules_graph import Finding, QdqGraph, Quantizer, dtype_of, rank_of

_SYMMETRIC = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4, ir.DataType.FLOAT4E2M1)
_BLOCKED = (ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1)
# What may stand in a graph that says it has this precision; weights of 4 bits go with 8-bit activations.
_OF_PRECISION = {
    "int8": (ir.DataType.INT8,),
    "fp8": (ir.DataType.FLOAT8E4M3FN,),
    "int4": (ir.DataType.INT4, ir.DataType.INT8),
    "fp16": (),
    "fp32": (),
}
PRECISIONS = tuple(_OF_PRECISION)


def unsigned_type(graph: QdqGraph) -> Iterator[Finding]:
    """TensorRT quantises to INT8, FP8 E4M3, INT4 and FP4 only."""
    for one in graph.quantizers:
        if one.dtype not in _SYMMETRIC and one.dtype not in (None, ir.DataType.INT32):
            yield Finding(one.name, f"quantised type {_name(one.dtype)}")


def other_precision(graph: QdqGraph) -> Iterator[Finding]:
    """A graph holds no quantised type besides its own precision's."""
    wanted = _OF_PRECISION[graph.precision]
    for one in graph.quantizers:
        if one.dtype in _SYMMETRIC and one.dtype not in wanted:
            yield Finding(
                one.name, f"quantised type {_name(one.dtype)} in a graph that is said to be {graph.precision}"
            )


def bias_int32(graph: QdqGraph) -> Iterator[Finding]:
    """A bias stays in float."""
    for one in graph.quantizers:
        if one.dtype == ir.DataType.INT32:
            yield Finding(one.name, f"it dequantises the INT32 tensor {_value(one.data)}")


def zero_point_missing(graph: QdqGraph) -> Iterator[Finding]:
    """The zero point gives QuantizeLinear its type; older parsers want it of DequantizeLinear too, 4 bits apart."""
    for one in graph.quantizers:
        four_bit = one.dtype in (ir.DataType.INT4, ir.DataType.FLOAT4E2M1)
        if not four_bit and (len(one.node.inputs) < 3 or one.node.inputs[2] is None):
            yield Finding(one.name, "it has no zero point")


def zero_point_constant(graph: QdqGraph) -> Iterator[Finding]:
    """The zero point is known at build time."""
    for one in graph.quantizers:
        given = len(one.node.inputs) > 2 and one.node.inputs[2] is not None
        if given and one.zero_point is None:
            yield Finding(one.name, f"zero point {_value(one.node.inputs[2])} is computed at run time")


def zero_point_nonzero(graph: QdqGraph) -> Iterator[Finding]:
    """Quantisation is symmetric."""
    for one in graph.quantizers:
        if one.zero_point is not None and bool(np.any(one.zero_point.astype(np.float32) != 0)):
            numbers = one.zero_point.astype(np.float32).reshape(-1)
            yield Finding(one.name, f"zero point {numbers[int(np.argmax(np.abs(numbers)))]:g}")


def scale_constant(graph: QdqGraph) -> Iterator[Finding]:
    """The scale is known at build time."""
    for one in graph.quantizers:
        if one.scale is None:
            yield Finding(one.name, f"scale {_value(one.node.inputs[1])} is computed at run time")


def scale_positive(graph: QdqGraph) -> Iterator[Finding]:
    """Scales are finite and above zero, and there is at least one."""
    for one in graph.quantizers:
        if one.scale is None:
            continue
        numbers = one.scale.astype(np.float32)
        if numbers.size == 0:
            yield Finding(one.name, "it has no scale")
            continue
        bad = numbers[~(np.isfinite(numbers) & (numbers > 0))]
        if bad.size:
            yield Finding(one.name, f"{bad.size} of {numbers.size} scales are {bad.reshape(-1)[0]:g}")


def scale_type(graph: QdqGraph) -> Iterator[Finding]:
    """Strong typing: the scale has the type of the float tensor that it quantises, and gives the type of the result."""
    for one in graph.quantizers:
        scale = dtype_of(one.node.inputs[1])
        if one.is_quantize:
            data = dtype_of(one.data)
            if scale is not None and data is not None and scale != data:
                yield Finding(one.name, f"scale {_name(scale)} for a {_name(data)} tensor")
            continue
        for node, index in readers(one.node.outputs[0], through=frozenset({"Reshape", "Transpose", "Identity"})):
            others = [dtype_of(node.inputs[other]) for other in (0, 1) if other != index and other < len(node.inputs)]
            mixed = is_standard(node, *PRODUCTS, "Add") and index < 2 and others and others[0] not in (None, scale)
            if mixed:
                yield Finding(one.name, f"scale {_name(scale)} beside a {_name(others[0])} tensor at {node.name}")
                break


def activation_per_tensor(graph: QdqGraph) -> Iterator[Finding]:
    """Activations have one scale."""
    for one in graph.quantizers:
        if not one.is_weight and one.scale is not None and one.scale.size > 1:
            yield Finding(one.name, f"{one.scale.size} scales for the activation {_value(one.data)}")


def weight_axis_wrong(graph: QdqGraph) -> Iterator[Finding]:
    """Scales of a weight follow its output channels, one for each."""
    for one in _channel_weights(graph):
        scales = 0 if one.scale is None else one.scale.size
        shape = None if one.data is None else one.data.shape
        axis = _axis(one)
        if axis is None or shape is None:
            continue
        if axis >= len(shape) or shape[axis] != scales:
            yield Finding(one.name, f"{scales} scales on axis {one.axis} of a weight of shape {list(shape)}")
            continue
        for node, wanted in _products(one):
            if wanted is not None and wanted != axis:
                yield Finding(
                    one.name, f"scales on axis {axis} of the weight of {node.name}, whose channels are {wanted}"
                )
                break


def weight_per_tensor(graph: QdqGraph) -> Iterator[Finding]:
    """One scale for a whole INT8 weight loses accuracy."""
    for one in graph.quantizers:
        if one.is_quantize or not one.is_weight or one.dtype != ir.DataType.INT8 or one.scale is None:
            continue
        if one.scale.size == 1 and any(True for _ in _products(one)):
            yield Finding(one.name, f"one scale for the weight {_value(one.data)}")


def weight_stored_float(graph: QdqGraph) -> Iterator[Finding]:
    """A weight is stored quantised: DequantizeLinear without QuantizeLinear."""
    for one in graph.quantizers:
        if one.is_quantize and one.is_weight:
            yield Finding(one.name, f"weight {_value(one.data)} is stored in float and quantised in the graph")


def four_bit_activation(graph: QdqGraph) -> Iterator[Finding]:
    """INT4 is for weights."""
    for one in graph.quantizers:
        if one.dtype == ir.DataType.INT4 and not one.is_weight:
            yield Finding(one.name, f"activation {_value(one.data)} in INT4")


def block_wrong(graph: QdqGraph) -> Iterator[Finding]:
    """Blocks of INT4, FP8 or FP4 along the last or second-last axis, with a scale for each."""
    for one in graph.quantizers:
        if one.block_size == 0:
            if one.scale is not None and one.scale.ndim > 1:
                yield Finding(one.name, f"scales of {one.scale.ndim} axes without block_size")
        elif (problem := _block_problem(one)) is not None:
            yield Finding(one.name, problem)


def scalar_input(graph: QdqGraph) -> Iterator[Finding]:
    """What is quantised has at least one axis."""
    for one in graph.quantizers:
        if rank_of(one.data) == 0:
            yield Finding(one.name, f"{_value(one.data)} is a scalar")


def fp8_not_saturating(graph: QdqGraph) -> Iterator[Finding]:
    """TensorRT clips what is beyond 448."""
    for one in graph.quantizers:
        if one.dtype == ir.DataType.FLOAT8E4M3FN and one.is_quantize and not one.node.attributes.get_int("saturate", 1):
            yield Finding(one.name, "saturate=0, which makes NaN of values beyond 448")


def opset_low(graph: QdqGraph) -> Iterator[Finding]:
    """`axis` came with opset 13, FP8 and FP16 scales with 19, INT4 and blocks with 21, FP4 with 23."""
    for one in graph.quantizers:
        wanted, what = _opset_wanted(one)
        if graph.opset < wanted:
            yield Finding(one.name, f"{what} needs opset {wanted}, the graph has {graph.opset}")


def _opset_wanted(one: Quantizer) -> tuple[int, str]:
    if one.dtype == ir.DataType.FLOAT4E2M1:
        return 23, "FP4"
    if one.dtype == ir.DataType.INT4:
        return 21, "INT4"
    if one.block_size:
        return 21, "block_size"
    if one.dtype == ir.DataType.FLOAT8E4M3FN:
        return 19, "FP8"
    if dtype_of(one.node.inputs[1]) == ir.DataType.FLOAT16:
        return 19, "an FP16 scale"
    if one.scale is not None and one.scale.ndim == 1 and one.scale.size > 1:
        return 13, "axis"
    return 10, one.node.op_type


def _block_problem(one: Quantizer) -> str | None:
    shape = None if one.data is None else one.data.shape
    if one.dtype not in _BLOCKED:
        return f"blocks of {_name(one.dtype)}"
    if shape is None or one.scale is None:
        return None
    rank, axis = len(shape), one.axis if one.axis >= 0 else one.axis + len(shape)
    if rank < 2 or axis not in (rank - 1, rank - 2):
        return f"blocks along axis {one.axis} of {rank}"
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    wanted = [-(-size // one.block_size) if index == axis else size for index, size in enumerate(sizes)]
    if list(one.scale.shape) != wanted:
        return f"scales of shape {list(one.scale.shape)} for {sizes} in blocks of {one.block_size}, not {wanted}"
    return None


def _channel_weights(graph: QdqGraph) -> Iterator[Quantizer]:
    for one in graph.quantizers:
        if (
            one.is_weight
            and not one.block_size
            and one.scale is not None
            and one.scale.ndim == 1
            and one.scale.size > 1
        ):
            yield one


def _axis(one: Quantizer) -> int | None:
    rank = rank_of(one.data)
    return None if rank is None else one.axis + rank if one.axis < 0 else one.axis


def _products(one: Quantizer) -> Iterator[tuple[ir.Node, int | None]]:
    """Products that read the weight, and the axis of its output channels in the weight's own layout.

    A Transpose between is looked through, with its permutation; after a Reshape the axis is unknown (None).
    """
    queue: list[tuple[ir.Value, list[int] | None]] = [(one.node.outputs[0], None)]
    while queue:
        value, order = queue.pop()
        for node, index in value.uses():
            if is_standard(node, "DequantizeLinear", "Identity", "Cast"):
                queue.append((node.outputs[0], order))
            elif is_standard(node, "Transpose"):
                rank = rank_of(value) or 2
                perm = list(node.attributes.get_ints("perm") or reversed(range(rank)))
                queue.append((node.outputs[0], perm if order is None else [order[one] for one in perm]))
            elif is_standard(node, *PRODUCTS) and index == 1:
                axis = weight_axis(node)
                yield node, axis if axis is None or order is None else order[axis]


def _name(dtype: ir.DataType | None) -> str:
    return "of unknown type" if dtype is None else dtype.name


def _value(value: ir.Value | None) -> str:
    return "?" if value is None else value.name or "?"
