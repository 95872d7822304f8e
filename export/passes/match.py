"""Small questions that passes ask of a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .weights import Array


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The standard-domain node of that type that computes `value`, else None."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def constant_of(value: ir.Value | None) -> Array | None:
    """The numbers of an initializer or constant, else None."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def constant_ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """The whole numbers of an integer constant with one axis, else None."""
    array = constant_of(value)
    if array is None or array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        return None
    return tuple(int(number) for number in array)


def permutation(node: ir.Node) -> tuple[int, ...]:
    """`perm` of a Transpose; empty when it has none."""
    return tuple(node.attributes.get_ints("perm") or ())


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, None when several do or when it is an output of the graph."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses))[0]
