"""Element types of values that a graph does not state.

ONNX's own inference gives up on graphs with contributed operators; only the element type is needed here, and that is
the first input's for all but a few operators.
"""

from __future__ import annotations

import onnx_ir as ir

from ..errors import ExportError

_BOOL = frozenset({"And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or"})
_INT64 = frozenset({"ArgMax", "ArgMin", "NonZero", "Shape", "Size"})
# Index of the input that has the output's type, where it is not the first.
_LIKE = {"DequantizeLinear": 1, "OneHot": 2, "Where": 1}


def fill_types(model: ir.Model) -> None:
    """Give every computed value of `model` that has none its element type.

    Raises ExportError for a value whose type does not follow from the node's inputs.
    """
    for node in model.graph:
        for value in node.outputs:
            if value.name and value.type is None:
                dtype = _dtype(node)
                if dtype is None:
                    raise ExportError(
                        f"{value.name}, an output of {node.op_type} {node.name}, has no type in the graph; export again"
                    )
                value.type = ir.TensorType(dtype)


def _dtype(node: ir.Node) -> ir.DataType | None:
    if node.op_type in _BOOL:
        return ir.DataType.BOOL
    if node.op_type in _INT64:
        return ir.DataType.INT64
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type == "Constant":
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        return None if tensor is None else tensor.dtype
    if node.op_type == "ConstantOfShape":
        return node.attributes["value"].as_tensor().dtype if "value" in node.attributes else ir.DataType.FLOAT
    if node.op_type == "QuantizeLinear":
        return _quantized(node)
    source = node.inputs[_LIKE.get(node.op_type, 0)] if node.inputs else None
    return None if source is None else source.dtype


def _quantized(node: ir.Node) -> ir.DataType | None:
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is not None:
        return zero_point.dtype
    wanted = node.attributes.get_int("output_dtype", 0)
    return ir.DataType(wanted) if wanted else ir.DataType.UINT8
