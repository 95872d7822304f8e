"""A transformer block as a small ONNX graph, its ranges, and the block quantised for TensorRT."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from tests.export.graphs import float_value, make_model, run, weight

from bridgeport.calibration.placement import PlaceTensorRT, plan_tensorrt
from bridgeport.calibration.records import TensorRange

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class _Builder:
    def __init__(self, seed: int) -> None:
        self.nodes: list[ir.Node] = []
        self._random = np.random.default_rng(seed)

    def add(self, op_type: str, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = f"{name}.out"
        self.nodes.append(node)
        return node.outputs[0]

    def linear(self, name: str, x: ir.Value, rows: int, columns: int) -> ir.Value:
        matrix = self._random.normal(size=(rows, columns), scale=rows**-0.5).astype(np.float32)
        product = self.add("MatMul", name, x, weight(f"{name}.weight", matrix))
        bias = self._random.normal(size=columns, scale=0.1).astype(np.float32)
        return self.add("Add", f"{name}.add", product, weight(f"{name}.bias", bias))

    def norm(self, name: str, x: ir.Value, width: int) -> ir.Value:
        gain, shift = np.ones(width, np.float32), np.zeros(width, np.float32)
        return self.add("LayerNormalization", name, x, weight(f"{name}.gain", gain), weight(f"{name}.shift", shift))


def block_model(
    *, tokens: int = 10, heads: int = 2, head_size: int = 16, mask: bool = False, opset: int = 20, seed: int = 0
) -> ir.Model:
    """Pre-norm attention and MLP: `x` `[batch, tokens, heads * head_size]` -> `y` of the same shape.

    Products: query, key, value, projection, fc1, fc2. Adds: residual1, residual2. Attention: scores, scale, (mask),
    softmax, mix.
    """
    width = heads * head_size
    build = _Builder(seed)
    x = float_value("x", "batch", tokens, width)
    normed = build.norm("norm1", x, width)
    split = weight("split", np.array([0, 0, heads, head_size], np.int64))
    parts = {}
    for name, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        part = build.add("Reshape", f"{name}.split", build.linear(name, normed, width, width), split)
        parts[name] = build.add("Transpose", f"{name}.heads", part, perm=perm)
    scores = build.add("MatMul", "scores", parts["query"], parts["key"])
    scores = build.add("Mul", "scale", scores, weight("factor", np.float32(head_size**-0.5)))
    if mask:
        penalty = np.zeros((1, 1, 1, tokens), np.float32)
        penalty[..., -1] = -1e4
        scores = build.add("Add", "mask", scores, weight("penalty", penalty))
    mix = build.add("MatMul", "mix", build.add("Softmax", "softmax", scores, axis=-1), parts["value"])
    joined = build.add("Transpose", "join", mix, perm=[0, 2, 1, 3])
    joined = build.add("Reshape", "joined", joined, weight("flat", np.array([0, 0, width], np.int64)))
    first = build.add("Add", "residual1", build.linear("projection", joined, width, width), x)
    hidden = build.linear("fc1", build.norm("norm2", first, width), width, 2 * width)
    hidden = build.linear("fc2", build.add("Gelu", "gelu", hidden), 2 * width, width)
    y = build.add("Add", "residual2", hidden, first)
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", tokens, width])
    return make_model([x], [y], build.nodes, opset)


def block_inputs(model: ir.Model, *, batch: int = 2, seed: int = 7) -> dict[str, FloatArray]:
    """Normal numbers for the one input of `model`."""
    value = model.graph.inputs[0]
    assert value.shape is not None
    shape = [dim if isinstance(dim, int) else batch for dim in value.shape]
    return {value.name or "": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


def observed(model: ir.Model, watch: tuple[str, ...], feeds: dict[str, FloatArray]) -> dict[str, TensorRange]:
    """Smallest and largest number of each watched value, from a run of the graph; `model` is left as it was."""
    values = ir.convenience.create_value_mapping(model.graph)
    asked = [name for name in watch if not values[name].is_graph_input() and not values[name].is_graph_output()]
    ends = [values[name] for name in asked]
    model.graph.outputs.extend(ends)
    names = [value.name or "" for value in model.graph.outputs]
    arrays = dict(zip(names, run(model, feeds), strict=True)) | feeds
    for _ in ends:
        model.graph.outputs.pop()
    return {name: TensorRange(float(arrays[name].min()), float(arrays[name].max())) for name in watch}


def quantized(model: ir.Model, precision: str = "int8", **options: Any) -> ir.Model:
    """`model` with Q/DQ, its ranges from one random input."""
    planned = {key: options[key] for key in ("keep", "attention", "residuals") if key in options}
    plan = plan_tensorrt(model, precision=precision, **planned)
    ranges = observed(model, plan.watch, block_inputs(model))
    return PlaceTensorRT(ranges, precision=precision, **options).run(model)[0]


def node_of(model: ir.Model, name: str) -> ir.Node:
    """The node of that name."""
    return next(node for node in model.graph if node.name == name)


def worst_cosine(a: FloatArray, b: FloatArray) -> float:
    """The smallest cosine between rows of the last axis."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / lengths).min())
