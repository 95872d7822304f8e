"""Where graphs add a skip connection, move data or compute an activation: read through Q/DQ and casts.

Placement and its rules both ask these questions, one of a float graph, the other of a quantised one.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
# Operators that move numbers and do not change them: Q/DQ on one side stands for Q/DQ on the other.
MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout"})
_TRANSPARENT = MOVES | {"Cast", QUANTIZE, DEQUANTIZE}
_SCALINGS = frozenset({"Mul", "Div"})


def is_standard(node: ir.Node | None, *op_types: str) -> bool:
    """Whether `node` is one of these operators of the standard domain."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def is_constant(value: ir.Value | None) -> bool:
    """Whether the numbers of `value` are in the file: an initializer or a Constant node."""
    return value is not None and (value.is_initializer() or ir.convenience.get_const_tensor(value) is not None)


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """Inputs that are computed at run time; a constant behind Q/DQ is none of them."""
    return [value for value in node.inputs if value is not None and not is_constant(origin(value))]


def infer_types(model: ir.Model) -> None:
    """Fill in the shapes and types that the file does not state; weights over 1 KiB are not read for it."""
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def origin(value: ir.Value | None) -> ir.Value | None:
    """The value whose numbers `value` holds: back through moves, casts and Q/DQ."""
    while value is not None:
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in _TRANSPARENT:
            break
        value = node.inputs[0]
    return value


def readers(value: ir.Value, *, through: frozenset[str] = MOVES | {"Cast"}) -> Iterator[tuple[ir.Node, int]]:
    """(node, input index) of everything that reads the numbers of `value`, moved or not."""
    for node, index in value.uses():
        if node.domain in ("", "ai.onnx") and node.op_type in through and index == 0:
            yield from readers(node.outputs[0], through=through)
        else:
            yield node, index


def product_of(value: ir.Value | None) -> ir.Node | None:
    """The MatMul, Gemm or Conv with a weight whose result (with bias, layer scale, moves) is `value`, else None."""
    while True:
        value = origin(value)
        node = None if value is None else value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in PRODUCTS:
            return node if len(node.inputs) > 1 and is_constant(origin(node.inputs[1])) else None
        inputs = data_inputs(node)
        if node.op_type not in _SCALINGS | {"Add"} or len(inputs) != 1:
            return None
        value = inputs[0]


def skip_input(node: ir.Node) -> int | None:
    """Which input of a residual Add (0 or 1) is the skip connection; None when `node` is no residual Add.

    A residual Add adds a value to what products with weights made of that same value. Only the skip is quantised: the
    other input is the product's own result, which fuses with the Add as long as nothing stands between them.
    """
    if not is_standard(node, "Add") or len(data_inputs(node)) != 2:
        return None
    for skip, branch in ((0, 1), (1, 0)):
        start = origin(node.inputs[skip])
        product = product_of(node.inputs[branch])
        if start is not None and product is not None and _is_ancestor(start, product.inputs[0]):
            return skip
    return None


def _is_ancestor(start: ir.Value, value: ir.Value | None) -> bool:
    """Whether `value` is computed from `start`."""
    queue, seen = [value], set()
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        if current is start:
            return True
        seen.add(id(current))
        if (producer := current.producer()) is not None:
            queue.extend(producer.inputs)
    return False
