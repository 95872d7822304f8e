"""What of a float graph can be quantised for TensorRT, and which values have to be observed for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from ...errors import InputError
from ..linears import find_linears
from .attention import Attention, find_attentions, unfused_reason
from .patterns import MOVES, infer_types, readers, skip_input

KEPT = "kept in float on request"


@dataclass(frozen=True)
class PlannedLinear:
    """A product with a weight: its input is quantised per tensor, its weight along `axis`."""

    node: ir.Node
    axis: int

    @property
    def value(self) -> ir.Value:
        """The activation."""
        return _given(self.node.inputs[0])

    @property
    def weight(self) -> ir.Value:
        """The initializer."""
        return _given(self.node.inputs[1])


@dataclass(frozen=True)
class PlannedAdd:
    """A residual Add: its input `skip` is quantised."""

    node: ir.Node
    skip: int

    @property
    def value(self) -> ir.Value:
        """The skip connection."""
        return _given(self.node.inputs[self.skip])


@dataclass(frozen=True)
class PlannedAttention:
    """An attention with a fused kernel: Q, K, the probabilities, V and the result are quantised.

    `result`: name of the value that gives the result's range, the output of the second matmul or what its only mover
    hands to the next product.
    """

    attention: Attention
    result: str

    @property
    def values(self) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Q, K^T, the probabilities and V."""
        one = self.attention
        inputs = (*one.scores.inputs, *one.mix.inputs)
        return (_given(inputs[0]), _given(inputs[1]), _given(inputs[2]), _given(inputs[3]))


@dataclass(frozen=True)
class Plan:
    """What placement will quantise. `left`: node -> why it stays in float."""

    linears: tuple[PlannedLinear, ...]
    adds: tuple[PlannedAdd, ...]
    attentions: tuple[PlannedAttention, ...]
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that will be quantised, as `keep` takes them: an attention by its first matmul."""
        found = [one.node for one in self.linears] + [one.node for one in self.adds]
        found += [one.attention.scores for one in self.attentions]
        return tuple(node.name or "" for node in found)

    @property
    def watch(self) -> tuple[str, ...]:
        """Names of the values whose ranges placement needs, each once."""
        names = [one.value.name for one in self.linears] + [one.value.name for one in self.adds]
        for one in self.attentions:
            names += [*(value.name for value in one.values), one.result]
        return tuple(dict.fromkeys(name or "" for name in names))


def plan_tensorrt(
    model: ir.Model,
    *,
    precision: str,
    keep: frozenset[str] = frozenset(),
    attention: bool = True,
    residuals: bool = True,
) -> Plan:
    """What of `model` can be quantised to `precision` ("int8", "fp8").

    `keep`: names of nodes that stay in float (an attention by either of its matmuls). Raises InputError for a name
    that is no node of the graph.
    """
    unknown = sorted(keep - {node.name or "" for node in model.graph})
    if unknown:
        raise InputError(f"nodes to keep in float: {unknown[:3]} are not in the graph; give names of its nodes")
    infer_types(model)
    left: dict[str, str] = {}
    linears = _plan_linears(model, keep, left)
    adds = _plan_adds(model, keep, left) if residuals else ()
    attentions = _plan_attentions(model, precision, keep, left) if attention else ()
    return Plan(linears, adds, attentions, left)


def weight_axis(node: ir.Node) -> int | None:
    """The axis of output channels of a product's weight; None when it has none that a scale can follow."""
    rank = None if (weight := node.inputs[1]) is None or weight.shape is None else len(weight.shape)
    if node.op_type == "Conv":
        return 0
    if rank != 2 or (node.op_type == "Gemm" and node.attributes.get_int("transA", 0) != 0):
        return None
    return 0 if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0 else 1


def _plan_linears(model: ir.Model, keep: frozenset[str], left: dict[str, str]) -> tuple[PlannedLinear, ...]:
    nodes = {node.name: node for node in model.graph}
    found = []
    for linear in find_linears(model):
        node = nodes[linear.node]
        axis = weight_axis(node)
        if linear.node in keep:
            left[linear.node] = KEPT
        elif axis is None:
            left[linear.node] = f"weight {linear.weight} is no matrix with a fixed axis of output channels"
        else:
            found.append(PlannedLinear(node, axis))
    return tuple(found)


def _plan_adds(model: ir.Model, keep: frozenset[str], left: dict[str, str]) -> tuple[PlannedAdd, ...]:
    found = []
    for node in model.graph:
        skip = skip_input(node)
        if skip is None:
            continue
        if node.name in keep:
            left[node.name or ""] = KEPT
        else:
            found.append(PlannedAdd(node, skip))
    return tuple(found)


def _plan_attentions(
    model: ir.Model, precision: str, keep: frozenset[str], left: dict[str, str]
) -> tuple[PlannedAttention, ...]:
    found = []
    for one in find_attentions(model):
        reason = unfused_reason(one, precision)
        if {one.scores.name, one.mix.name} & keep:
            reason = KEPT
        elif reason is None and precision == "fp8":
            reason = _unscalable(one)
        if reason is None:
            found.append(PlannedAttention(one, _result_of(one)))
        else:
            left[one.scores.name or ""] = reason
    return tuple(found)


def _unscalable(attention: Attention) -> str | None:
    """FP8 kernels want the scale before Q is quantised: it must be one number that acts before any mask is added."""
    if len(attention.scalings) > 1:
        return "the scores are scaled more than once"
    for node in attention.scalings:
        factor = scaling_factor(node)
        if factor is None or node.inputs[0] is not attention.scores.outputs[0]:
            return "the scale of the scores cannot be moved to the queries"
    return None


def scaling_factor(node: ir.Node) -> float | None:
    """The number that a Mul or Div by a constant multiplies its first input by; None when it is not one number."""
    tensor = ir.convenience.get_const_tensor(_given(node.inputs[1]))
    if tensor is None or tensor.size != 1:
        return None
    number = float(tensor.numpy().reshape(()))
    return number if node.op_type == "Mul" else 1.0 / number


def _result_of(attention: Attention) -> str:
    """The value that a product reads the result as, else the result itself: the numbers are the same."""
    output = attention.mix.outputs[0]
    for node, index in readers(output, through=MOVES):
        if node.op_type == "MatMul" and index == 0:
            return _given(node.inputs[0]).name or ""
    return output.name or ""


def _given(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise InputError("a product without a second input; check the graph with onnx.checker")
    return value
