"""The layers that quantisation is about: products with a constant weight."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ..export.passes.modules import module_stack

_WEIGHT_OPERATORS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class Linear:
    """A MatMul, Gemm or Conv with a constant weight.

    `node`: the node's name, the key in keep lists, tables and sensitivities. `input`, `output`: names of the values
    that it reads and gives. `weight`: the initializer.
    """

    node: str
    op_type: str
    input: str
    weight: str
    output: str


def find_linears(model: ir.Model) -> tuple[Linear, ...]:
    """All of them, in the order of the graph."""
    found = []
    for node in model.graph:
        if node.domain != "" or node.op_type not in _WEIGHT_OPERATORS:
            continue
        value, weight = node.inputs[0], node.inputs[1]
        if value is None or weight is None or value.const_value is not None:
            continue
        if weight.const_value is None or weight.name not in model.graph.initializers:
            continue
        names = (node.name, value.name, weight.name, node.outputs[0].name)
        found.append(Linear(names[0] or "", node.op_type, names[1] or "", names[2] or "", names[3] or ""))
    return tuple(found)


def layer_of(node: ir.Node) -> str:
    """Path of the module that the node was traced in ("layers.3.mlp.fc1"); the node's own name where none is known."""
    stack = module_stack(node)
    return stack[-1] if stack else node.name or node.op_type
