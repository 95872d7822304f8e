"""Products and their operands in the forms that ONNX Runtime's CPU kernels read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...errors import InputError
from ...export.passes.match import only_consumer
from ...export.passes.modules import SCOPES
from ...export.passes.weights import constant, derived_initializer
from ..linears import find_linears
from ..records import TensorRange
from .base import channel_absmax, drop_unused

CONTRIBUTED = "com.microsoft"


@dataclass(frozen=True)
class LinearPart:
    """`x @ weight + bias`: a MatMul, and the Add of its bias where it has one. `x`: `[..., K]`; `weight`: `[K, N]`."""

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    add: ir.Node | None
    bias: ir.Value | None

    @property
    def output(self) -> ir.Value:
        """The result, `[..., N]`."""
        return (self.add or self.node).outputs[0]

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All of it, in the order of the graph."""
        return (self.node,) if self.add is None else (self.node, self.add)

    def weights(self) -> NDArray[np.float32]:
        """The numbers of `weight`."""
        return _numbers(self.weight)


def find_linear_parts(model: ir.Model) -> tuple[LinearPart, ...]:
    """Every MatMul with a matrix of weights, in the order of the graph."""
    nodes = {node.name: node for node in model.graph}
    found = (nodes[linear.node] for linear in find_linears(model) if linear.op_type == "MatMul")
    return tuple(part for node in found if (part := linear_part(node)) is not None)


def linear_part(node: ir.Node | None) -> LinearPart | None:
    """The product that `node` computes, None when it is no MatMul by a stored float matrix."""
    if node is None or node.op_type != "MatMul" or node.domain != "":
        return None
    x, weight = node.inputs
    if x is None or weight is None or not weight.is_initializer() or weight.const_value is None:
        return None
    if len(weight.const_value.shape) != 2 or weight.const_value.dtype != ir.DataType.FLOAT:
        return None
    add = only_consumer(node.outputs[0])
    bias = None
    if add is not None and add.op_type == "Add" and add.domain == "":
        other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
        columns = weight.const_value.shape.numpy()[1]
        if other is not None and other.const_value is not None and other.const_value.shape.numpy() == (columns,):
            bias = other
    return LinearPart(node, x, weight, add if bias is not None else None, bias)


@dataclass(frozen=True)
class WeightFormat:
    """Symmetric signed integers of `bits` bits (7 or 8) in INT8 storage, a scale for each column."""

    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (7, 8):
            raise InputError(f"weights of {self.bits} bits; accepted are 8, and 7 where the processor has no VNNI")

    @property
    def largest(self) -> int:
        """Magnitude of the largest number."""
        return int(2 ** (self.bits - 1) - 1)

    def scales(self, array: NDArray[Any]) -> NDArray[np.float32]:
        """One positive scale for each column of `[K, N]`."""
        scales = channel_absmax(array, 1) / np.float32(self.largest)
        return np.where(scales > 0, scales, np.float32(1.0)).astype(np.float32)

    def quantize(self, array: NDArray[Any], scales: NDArray[np.float32]) -> NDArray[np.int8]:
        """`array / scales`, ties to even, clipped."""
        return np.clip(np.rint(array / scales), -self.largest, self.largest).astype(np.int8)


def store_weight(model: ir.Model, weight: ir.Value, quantization: WeightFormat) -> tuple[ir.Value, ir.Value]:
    """`weight` as INT8 `[K, N]` and its scales `[N]`; the numbers are computed when the file is written."""
    if weight.const_value is None:
        raise InputError(f"{weight.name} is no weight of the graph; only initializers can be stored quantised")
    source = weight.const_value
    scales = quantization.scales(source.numpy())
    stored = derived_initializer(
        model,
        f"{weight.name}.int8",
        source,
        lambda array: quantization.quantize(array, scales),
        source.shape.numpy(),
        ir.DataType.INT8,
    )
    return stored, constant(model, f"{weight.name}.int8.scale", scales)


def uint8_grid(name: str, found: TensorRange | None) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scale and zero point that cover a range and 0, which is exact. InputError without a range, or without an end."""
    if found is None:
        raise InputError(f"{name} has no range; observe every value that `watch_cpu` names")
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    if not np.isfinite(high - low):
        raise InputError(f"{name} ranges from {found.low} to {found.high}; finite numbers are accepted, look for NaN")
    scale = (high - low) / 255.0 or 1.0
    return np.array(scale, np.float32), np.array(np.clip(round(-low / scale), 0, 255), np.uint8)


class Quantized(Protocol):
    """Where UINT8 activations come from."""

    def __call__(self, model: ir.Model, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """`x` in UINT8, its scale and its zero point; all who read `x` share them."""


@dataclass
class Dynamic:
    """Scale and zero point found at run time, from the smallest and largest number of the whole tensor."""

    known: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = field(default_factory=dict)

    def __call__(self, model: ir.Model, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        if x not in self.known:
            node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name=f"{x.name}/DynamicQuantizeLinear")
            for output, suffix, dtype in zip(
                node.outputs,
                ("quantized", "scale", "zero_point"),
                (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8),
                strict=True,
            ):
                output.name, output.type = f"{x.name}.{suffix}", ir.TensorType(dtype)
            node.outputs[0].shape = x.shape
            insert_behind(model, x, [node])
            self.known[x] = (node.outputs[0], node.outputs[1], node.outputs[2])
        return self.known[x]


@dataclass
class Static:
    """Scale and zero point from calibration."""

    ranges: Mapping[str, TensorRange]
    known: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = field(default_factory=dict)

    def __call__(self, model: ir.Model, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        if x not in self.known:
            scale, zero = uint8_grid(x.name or "", self.ranges.get(x.name or ""))
            step = constant(model, f"{x.name}.scale", scale)
            point = constant(model, f"{x.name}.zero_point", zero)
            node = ir.node("QuantizeLinear", [x, step, point], name=f"{x.name}/QuantizeLinear")
            node.outputs[0].name, node.outputs[0].shape = f"{x.name}.quantized", x.shape
            node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
            insert_behind(model, x, [node])
            self.known[x] = (node.outputs[0], step, point)
        return self.known[x]


def replace_linear(model: ir.Model, part: LinearPart, activations: Quantized, weights: WeightFormat) -> None:
    """The product and its bias as one MatMulIntegerToFloat. ONNX Runtime merges it with a DynamicQuantizeLinear that
    nothing else reads.
    """
    quantized, scale, zero = activations(model, part.x)
    stored, weight_scale = store_weight(model, part.weight, weights)
    inputs = [quantized, stored, scale, weight_scale, zero, None, part.bias]
    node = ir.node(
        "MatMulIntegerToFloat",
        inputs[: 5 if part.bias is None else 7],
        domain=CONTRIBUTED,
        name=f"{part.node.name}/MatMulIntegerToFloat",
    )
    replace_nodes(model, part.nodes, part.output, [node], scope=part.node)
    drop_unused(model, part.weight)


def replace_nodes(
    model: ir.Model, old: tuple[ir.Node, ...], output: ir.Value, new: list[ir.Node], *, scope: ir.Node
) -> None:
    """`new`, whose last node computes `output` from now on under the same name, in the place of `old`.

    `scope`: the node whose module they belong to. `old`: in the order of the graph.
    """
    result = new[-1].outputs[0]
    result.type, result.shape = output.type, output.shape
    name = output.name
    for node in new:
        if SCOPES in scope.metadata_props:
            node.metadata_props[SCOPES] = scope.metadata_props[SCOPES]
    model.graph.insert_before(old[-1], new)
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    for node in reversed(old):
        model.graph.remove(node, safe=True)
    result.name = name


def insert_behind(model: ir.Model, x: ir.Value, nodes: list[ir.Node]) -> None:
    """`nodes` right behind what computes `x`: at the start for an input of the graph."""
    producer = x.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], nodes)
        return
    for node in nodes:
        if SCOPES in producer.metadata_props:
            node.metadata_props[SCOPES] = producer.metadata_props[SCOPES]
    model.graph.insert_after(producer, nodes)


def _numbers(value: ir.Value) -> NDArray[np.float32]:
    if value.const_value is None:
        raise InputError(f"{value.name} is no weight of the graph; only initializers can be stored quantised")
    return np.asarray(value.const_value.numpy(), np.float32)
