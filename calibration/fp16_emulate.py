"""FP16 graphs on a CPU as an accelerator would compute them.

ONNX Runtime's CPU provider has next to no FP16 kernels. It computes such nodes in FP32 and removes the Casts between
them, even with optimisation off: an activation of 1e7 in the middle of a graph goes through unharmed, where a GPU makes
it infinite. So every value is rounded to FP16 explicitly, in an FP32 graph, where such a pair of Casts is left alone.
"""

from __future__ import annotations

import onnx_ir as ir

from .fp16 import insert_cast
from .fp16_operators import EXACT
from .fp16_types import fill_types

_HALF, _SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_UNROUNDED, _ROUNDED = ".unrounded", ".rounded"


def has_float16(model: ir.Model) -> bool:
    """Whether anything in the graph is FP16."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    return any(v.dtype == _HALF for v in values) or any(v.dtype == _HALF for n in model.graph for v in n.outputs)


def emulate_float16(model: ir.Model) -> ir.Model:
    """Turn the graph into one that computes in FP32 and rounds every result to FP16; ends keep their types.

    A value keeps its name and is FP32 then, already rounded; NaN and infinity come out where FP16 has them. Products
    still accumulate in FP32, as tensor cores do.
    """
    fill_types(model)
    reads_half = {node: any(v is not None and v.dtype == _HALF for v in node.inputs) for node in model.graph}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype == _HALF:
            _widen(model, value)
    for node in list(reads_half):
        for value in node.outputs:
            if value.dtype == _HALF:
                _round(model, node, value, computes=reads_half[node])
    return model


def computing_node(value: ir.Value) -> ir.Node | None:
    """The node of the graph that was emulated which computes `value`, past the Casts that round it."""
    node = value.producer()
    while node is not None and node.op_type == "Cast":
        source = node.inputs[0]
        if source is None or not (source.name or "").endswith((_UNROUNDED, _ROUNDED)):
            break
        node = source.producer()
    return node


def _widen(model: ir.Model, value: ir.Value) -> None:
    """What is stored or given in FP16 is read in FP32."""
    uses = tuple(value.uses())
    if not uses:
        return
    wide = insert_cast(model, value, _SINGLE)
    for node, index in uses:
        node.replace_input_with(index, wide)


def _round(model: ir.Model, node: ir.Node, value: ir.Value, *, computes: bool) -> None:
    """`value` under its name is FP32 with FP16's numbers; as an end of the graph it stays FP16.

    ``computes``: the node reads FP16, so it computes in FP32 from now on and its result must be rounded.
    """
    name, uses = value.name or "", tuple(value.uses())
    if computes:
        value.type = ir.TensorType(_SINGLE)
        if node.op_type in EXACT and not value.is_graph_output():
            return
        value.name = f"{name}{_UNROUNDED}"
        half = insert_cast(model, value, _HALF)
        half.name = f"{name}{_ROUNDED}"
    else:
        half = value
        half.name = f"{name}{_ROUNDED}"
    wide = insert_cast(model, half, _SINGLE)
    wide.name = name
    for reader, index in uses:
        reader.replace_input_with(index, wide)
    if value.is_graph_output():
        wide.name, half.name = f"{name}.float32", name
        index = list(model.graph.outputs).index(value)
        model.graph.outputs[index] = half
