"""How much memory a graph's intermediate values take at given sizes: liveness over its nodes, in their order.

Nothing is fused here and every value has memory of its own, except views (Reshape and the like). TensorRT fuses
pointwise chains and attention and puts values that are not alive together into one place, so what it takes is less as a
rule; the tactics' scratch memory comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ...calibration.placement.patterns import infer_types

_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})


@dataclass(frozen=True)
class Activations:
    """Bytes at one setting of the axes. `peak`: most that is alive at once, `largest`: the largest single value.

    `unknown`: values whose shape inference gave up; each was taken for as large as the largest input of its node.
    """

    peak: int
    largest: int
    values: int
    unknown: int


def weight_bytes(model: ir.Model) -> dict[str, int]:
    """Bytes of initializers and constants in the graph, by element type, the largest first."""
    found: dict[str, int] = {}
    for graph in model.graphs():
        tensors = [value.const_value for value in graph.initializers.values()]
        tensors += [
            attribute.as_tensor()
            for node in graph
            for attribute in node.attributes.values()
            if attribute.type == ir.AttributeType.TENSOR
        ]
        for tensor in tensors:
            if tensor is not None:
                name = tensor.dtype.name.lower()
                found[name] = found.get(name, 0) + tensor.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def activations(path: Path, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> Activations:
    """Liveness of the graph `path` with inputs of these `shapes`; `sizes`: what the named axes are."""
    model = ir.load(path)
    _bind(model, shapes, sizes)
    infer_types(model)
    return _live(model.graph)


def _bind(model: ir.Model, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> None:
    for value in model.graph.inputs:
        if value.name is not None and value.name in shapes:
            value.shape = ir.Shape(shapes[value.name])
    inputs = set(model.graph.inputs)
    for node in model.graph:
        for value in node.outputs:
            if value in inputs or value.shape is None:
                continue
            dims = [dim if isinstance(dim, int) else sizes.get(str(dim.value)) for dim in value.shape]
            value.shape = ir.Shape(dims)


def _live(graph: ir.Graph) -> Activations:
    nodes = list(graph)
    ends = {id(value) for value in graph.outputs}
    root: dict[int, int] = {}
    size: dict[int, int] = {}
    last: dict[int, int] = {}
    unknown = 0
    for step, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and id(value) in root:
                last[root[id(value)]] = step
        view = node.op_type in _VIEWS and node.inputs[0] is not None and id(node.inputs[0]) in root
        for value in node.outputs:
            if not value.name or node.op_type == "Constant":
                continue
            if view:
                root[id(value)] = root[id(node.inputs[0])]
                continue
            root[id(value)] = id(value)
            nbytes = _bytes(value)
            unknown += nbytes is None
            size[id(value)] = _largest_input(node, size, root) if nbytes is None else nbytes
            # An output of the graph is a buffer of the caller, counted there.
            size[id(value)] *= id(value) not in ends
            last[id(value)] = step
    return Activations(_peak(nodes, size, last), max(size.values(), default=0), len(size), unknown)


def _peak(nodes: list[ir.Node], size: Mapping[int, int], last: Mapping[int, int]) -> int:
    ending: dict[int, list[int]] = {}
    for value, step in last.items():
        ending.setdefault(step, []).append(value)
    peak = alive = 0
    for step, node in enumerate(nodes):
        alive += sum(size.get(id(value), 0) for value in node.outputs)
        peak = max(peak, alive)
        alive -= sum(size.get(value, 0) for value in ending.get(step, ()))
    return peak


def _bytes(value: ir.Value) -> int | None:
    if value.shape is None or value.dtype is None:
        return None
    count = 1
    for dim in value.shape:
        if not isinstance(dim, int):
            return None
        count *= dim
    return int(count * value.dtype.itemsize)


def _largest_input(node: ir.Node, size: Mapping[int, int], root: Mapping[int, int]) -> int:
    known = [size.get(root.get(id(value), 0), 0) or _bytes(value) or 0 for value in node.inputs if value is not None]
    return max(known, default=0)
