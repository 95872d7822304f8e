"""Quantised weights put into a graph: MatMulNBits for ONNX Runtime, DequantizeLinear for TensorRT."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...export.passes.gqa import CONTRIB
from .blocks import BlockedWeight, Floats, pack_int4


def replace_by_matmul_nbits(
    model: ir.Model, weight: ir.Value, packed: NDArray[np.uint8], scales: Floats, attributes: dict[str, int]
) -> None:
    """Every MatMul by `weight` becomes a MatMulNBits (com.microsoft) of the same name with "_Q<bits>" behind it."""
    bits = attributes["bits"]
    stored = [
        _add_initializer(model, ir.Tensor(packed, name=f"{weight.name}_Q{bits}")),
        _add_initializer(model, ir.Tensor(scales, name=f"{weight.name}_scales")),
    ]
    for old, _ in tuple(weight.uses()):
        node = ir.node(
            "MatMulNBits",
            [old.inputs[0], *stored],
            attributes,
            domain=CONTRIB,
            name=f"{old.name}_Q{bits}",
            metadata_props=dict(old.metadata_props),
        )
        output, result = old.outputs[0], node.outputs[0]
        result.type, result.shape = output.type, output.shape
        name, output.name = output.name, None
        model.graph.insert_before(old, node)
        ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
        model.graph.remove(old, safe=True)
        result.name = name
    del model.graph.initializers[weight.name or ""]


def insert_dequantize(model: ir.Model, weight: ir.Value, blocked: BlockedWeight, bits: int) -> int:
    """`weight` becomes DequantizeLinear of INT4 in blocks along axis 0, or of INT8 per column; returns its bytes.

    No QuantizeLinear: the weight is stored quantised. INT8 has a zero point of 0, which older parsers ask for; INT4
    came later and has none.
    """
    name = f"{weight.name}_Q{bits}"
    tensor: ir.TensorProtocol
    if bits == 4:
        tensor = ir.PackedTensor(
            pack_int4(blocked.values), ir.DataType.INT4, shape=ir.Shape(blocked.values.shape), name=name
        )
        scales, attributes = blocked.scales, {"axis": 0, "block_size": blocked.block_size}
    else:
        tensor = ir.Tensor(blocked.values, name=name)
        scales, attributes = blocked.scales[0], {"axis": 1}
    stored = [
        _add_initializer(model, tensor),
        _add_initializer(model, ir.Tensor(scales, name=f"{weight.name}_scales")),
    ]
    if bits == 8:
        zeros = ir.Tensor(np.zeros(scales.shape, np.int8), name=f"{weight.name}_zero_point")
        stored.append(_add_initializer(model, zeros))
    node = ir.node("DequantizeLinear", stored, attributes, name=f"{weight.name}/DequantizeLinear")
    output: Any = node.outputs[0]
    output.name = f"{weight.name}_dequantized"
    output.type, output.shape = weight.type, weight.shape
    model.graph.insert_before(next(iter(model.graph)), node)
    ir.convenience.replace_all_uses_with(weight, output)
    del model.graph.initializers[weight.name or ""]
    return tensor.nbytes + scales.nbytes


def _add_initializer(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value
