"""One fused query/key/value projection becomes three.

A fused `Linear` to `3 * D` followed by a five-axis transpose and three gathers moves every activation twice for
nothing. Three projections, each with its own four-axis transpose, compute the same numbers (every output is the same
dot product) without the moves, and are what engines look for when they fuse attention.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .base import GraphPass
from .match import constant_ints, constant_of, only_consumer, permutation, producer
from .modules import SCOPES
from .weights import Array, constant, derived_initializer

_PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class _FusedQkv:
    """`gathers[i] = Transpose(Reshape(MatMul(x, weight) + bias), 2 0 3 1 4)[i]`; weight `[D, 3 * heads * size]`."""

    matmul: ir.Node
    bias: ir.Value | None
    reshape: ir.Node
    heads: int
    size: int
    gathers: tuple[ir.Node, ir.Node, ir.Node]

    @property
    def weight(self) -> ir.Value:
        value = self.matmul.inputs[1]
        assert value is not None
        return value


class SplitFusedQkv(GraphPass):
    """Split fused query/key/value projections whose weight is an initializer."""

    name = "split-fused-qkv"

    def requires(self, model: ir.Model) -> str | None:
        """There must be such a projection."""
        if any(_match(node) for node in model.graph):
            return None
        return "no fused query/key/value projection"

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Rewrite each match; the shared nodes go when nothing reads them any more."""
        matches = [match for node in model.graph if (match := _match(node)) is not None]
        for match in matches:
            for index, gather in enumerate(match.gathers):
                _replace_part(model, match, index, gather)
        RemoveUnusedNodesPass()(model)
        return model, bool(matches)

    def ensures(self, model: ir.Model) -> str | None:
        """No fused projection is left."""
        left = [node.name for node in model.graph if _match(node)]
        return f"fused projections are left at {left[:3]}" if left else None


def _match(transpose: ir.Node) -> _FusedQkv | None:
    if transpose.op_type != "Transpose" or permutation(transpose) != (2, 0, 3, 1, 4):
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    if reshape is None or (shape := _head_shape(transpose)) is None:
        return None
    source, bias = reshape.inputs[0], None
    add = producer(source, "Add")
    if add is not None:
        bias = next((value for value in add.inputs if constant_of(value) is not None), None)
        source = next((value for value in add.inputs if value is not bias), None)
    matmul = producer(source, "MatMul")
    gathers = _gathers(transpose)
    if matmul is None or gathers is None or (add is not None and bias is None):
        return None
    weight = matmul.inputs[1]
    if weight is None or weight.const_value is None:
        return None
    return _FusedQkv(matmul, bias, reshape, shape[0], shape[1], gathers)


def _head_shape(transpose: ir.Node) -> tuple[int, int] | None:
    """(heads, head size), read off the transposed `[3, B, heads, N, size]`."""
    reshape = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
    dims = constant_ints(reshape.inputs[1]) if reshape is not None else None
    if dims is None or len(dims) != 5 or dims[2] != 3 or dims[3] < 1 or dims[4] < 1:
        return None
    return dims[3], dims[4]


def _gathers(transpose: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    found: dict[int, ir.Node] = {}
    for node, index in transpose.outputs[0].uses():
        picked = constant_of(node.inputs[1]) if node.op_type == "Gather" and index == 0 else None
        if picked is None or picked.ndim != 0 or node.attributes.get_int("axis", 0) != 0:
            return None
        found[int(picked)] = node
    return (found[0], found[1], found[2]) if sorted(found) == [0, 1, 2] else None


def _replace_part(model: ir.Model, match: _FusedQkv, index: int, gather: ir.Node) -> None:
    """`gather` reads a projection of its own: MatMul, Add, Reshape, Transpose."""
    width = match.heads * match.size
    columns = slice(index * width, (index + 1) * width)
    part = _PARTS[index]
    weight = match.weight
    assert weight.const_value is not None
    rows = weight.const_value.shape.numpy()[0]
    pieces = [
        derived_initializer(
            model,
            f"{weight.name}.{part}",
            weight.const_value,
            lambda array: array[:, columns],
            [rows, width],
        )
    ]
    if match.bias is not None and match.bias.const_value is not None:
        bias: Array = match.bias.const_value.numpy()[columns]
        pieces.append(constant(model, f"{match.bias.name}.{weight.name}.{part}", bias))

    # Keys are read transposed: one permutation instead of two.
    last, perm = gather, [0, 2, 1, 3]
    after = only_consumer(gather.outputs[0])
    if after is not None and after.op_type == "Transpose" and permutation(after) == (0, 1, 3, 2):
        last, perm = after, [0, 2, 3, 1]

    split = constant(model, f"shape_0_0_{match.heads}_{match.size}", np.array([0, 0, match.heads, match.size]))
    nodes = [ir.node("MatMul", [match.matmul.inputs[0], pieces[0]])]
    if len(pieces) == 2:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], pieces[1]]))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], split]))
    nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": perm}))
    _place(model, match, part, gather, nodes)
    result, old = nodes[-1].outputs[0], last.outputs[0]
    result.type, result.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, result)


def _place(model: ir.Model, match: _FusedQkv, part: str, gather: ir.Node, nodes: list[ir.Node]) -> None:
    """Name the new nodes, give them the module stack of the attention (not of the fused Linear), insert them."""
    stack = ast.literal_eval(match.reshape.metadata_props.get(SCOPES, "['']"))[:-1]
    for node in nodes:
        node.name = f"{gather.name}/{part}/{node.op_type}"
        node.metadata_props[SCOPES] = repr([*stack, f"{part}_{node.op_type.lower()}"])
        node.outputs[0].name = f"{gather.outputs[0].name}_{part}_{node.op_type.lower()}"
        if node.outputs[0].type is None:
            node.outputs[0].type = gather.outputs[0].type
    model.graph.insert_before(gather, nodes)
