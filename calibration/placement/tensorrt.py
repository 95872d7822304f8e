"""Q/DQ for TensorRT's explicit quantisation, as a graph pass.

Symmetric INT8 or FP8 with zero point 0: activations per tensor, one pair for each value however many read it, on the
inputs of products with a weight and on the skip connection of residual Adds; weights stored quantised, per output
channel, with a DequantizeLinear and no QuantizeLinear; attention only where a fused kernel exists. LayerNormalization,
Softmax, GELU, masks and biases stay in float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...errors import InputError
from ...export.passes import GraphPass
from ...export.passes.weights import constant
from ..records import TensorRange
from .base import FORMATS, add_pair, add_weight, drop_unused, scales_from
from .patterns import DEQUANTIZE, QUANTIZE
from .plan import Plan, PlannedAttention, plan_tensorrt, scaling_factor


@dataclass(frozen=True)
class Placement:
    """What was done. `quantized`: nodes that compute in the low precision; `left`: node -> why it did not become so.

    `pairs`: activations with Q/DQ; `weights`: weights stored in the low precision.
    """

    quantized: tuple[str, ...]
    left: Mapping[str, str]
    pairs: int
    weights: int


class PlaceTensorRT(GraphPass):
    """Quantise what TensorRT runs faster in `precision`; what was done is in `placement` afterwards.

    `ranges`: value name -> range, for every name of `plan_tensorrt(...).watch`. `keep`: nodes that stay in float.
    `attention`, `residuals`: whether batch matmuls and skip connections are candidates at all. `per_channel`: False
    for one scale per weight, which only FP8 may have. Raises InputError for a missing or unusable range.
    """

    name = "place-tensorrt"
    mandatory = True

    def __init__(
        self,
        ranges: Mapping[str, TensorRange],
        *,
        precision: str,
        keep: frozenset[str] = frozenset(),
        attention: bool = True,
        residuals: bool = True,
        per_channel: bool = True,
    ) -> None:
        if precision not in FORMATS:
            raise InputError(f"precision {precision} has no Q/DQ placement; {sorted(FORMATS)} are accepted")
        if precision == "int8" and not per_channel:
            raise InputError("one scale for a whole INT8 weight loses too much accuracy; leave per_channel on")
        self._ranges, self._format, self._keep = ranges, FORMATS[precision], keep
        self._attention, self._residuals, self._per_channel = attention, residuals, per_channel
        self.placement = Placement((), {}, 0, 0)

    def requires(self, model: ir.Model) -> str | None:
        """The graph must not be quantised yet."""
        found = [node.name for node in model.graph if node.op_type in (QUANTIZE, DEQUANTIZE)]
        return f"the graph is quantised already, at {found[:3]}" if found else None

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Insert the pairs and store the weights."""
        plan = plan_tensorrt(
            model,
            precision=self._format.name,
            keep=self._keep,
            attention=self._attention,
            residuals=self._residuals,
        )
        missing = [name for name in plan.watch if name not in self._ranges and not self._is_fixed(plan, name)]
        if missing:
            raise InputError(
                f"{len(missing)} values have no range, the first {missing[:3]}; observe all names of the plan's `watch`"
            )
        work = _Work(left=dict(plan.left))
        for one in plan.attentions:
            self._collect_attention(model, one, work)
        for linear in plan.linears:
            if self._collect(linear.value, linear.node, 0, work):
                weight = linear.weight
                axis = linear.axis if self._per_channel else None
                linear.node.replace_input_with(1, add_weight(model, linear.node, weight, axis, self._format))
                drop_unused(model, weight)
                work.weights += 1
        for add in plan.adds:
            self._collect(add.value, add.node, add.skip, work)
        for value, (absmax, uses) in work.edges.items():
            pair = add_pair(model, value, scales_from(absmax, self._format), self._format)
            for node, index in uses:
                node.replace_input_with(index, pair)
        self.placement = Placement(tuple(dict.fromkeys(work.quantized)), work.left, len(work.edges), work.weights)
        return model, bool(work.edges)

    def ensures(self, model: ir.Model) -> str | None:
        """The rules of explicit quantisation hold."""
        from ..rules import check_rules

        broken = [one for one in check_rules(model, precision=self._format.name) if one.severity == "error"]
        return f"{broken[0].rule} at {broken[0].node}: {broken[0].why}" if broken else None

    def _is_fixed(self, plan: Plan, name: str) -> bool:
        """Softmax gives 0 to 1: FP8 kernels want exactly that range, whatever was observed."""
        return self._format.name == "fp8" and any(name == one.values[2].name for one in plan.attentions)

    def _collect(self, value: ir.Value, node: ir.Node, index: int, work: _Work) -> bool:
        """Note that `node` is to read `value` quantised; False, with a note, for a value that never changes."""
        absmax, reason = self._magnitude(value.name or "")
        if reason is not None:
            work.left[node.name or ""] = reason
            return False
        work.add(value, absmax, node, index)
        return True

    def _magnitude(self, name: str) -> tuple[float, str | None]:
        seen = self._ranges[name]
        if not (math.isfinite(seen.low) and math.isfinite(seen.high)):
            raise InputError(
                f"value {name} reached {seen.low:g} to {seen.high:g} in calibration; only finite activations can be "
                "quantised, look for NaN or overflow in the checkpoint"
            )
        if seen.low == seen.high:
            return 0.0, f"its input {name} was {seen.low:g} everywhere in calibration"
        return seen.absmax, None

    def _collect_attention(self, model: ir.Model, one: PlannedAttention, work: _Work) -> None:
        """Q and K^T, the probabilities and V, and the result; all of them or none."""
        scores, mix = one.attention.scores, one.attention.mix
        magnitudes = []
        for name in (*(value.name or "" for value in one.values), one.result):
            fixed = self._format.name == "fp8" and name == one.values[2].name
            absmax, reason = (1.0, None) if fixed else self._magnitude(name)
            if reason is not None:
                work.left[scores.name or ""] = reason
                return
            magnitudes.append(absmax)
        query, key, probabilities, value = one.values
        if self._format.name == "fp8":
            query, factor = _scale_queries(model, one)
            magnitudes[0] *= factor
        for tensor, absmax, node, index in zip(
            (query, key, probabilities, value), magnitudes[:4], (scores, scores, mix, mix), (0, 1, 0, 1), strict=True
        ):
            work.add(tensor, absmax, node, index)
        for node, index in tuple(mix.outputs[0].uses()):
            work.add(mix.outputs[0], magnitudes[4], node, index)


class _Work:
    """What `run` gathers before it changes the graph: a value gets its one pair when all its readers are known."""

    def __init__(self, left: dict[str, str]) -> None:
        self.left = left
        self.edges: dict[ir.Value, tuple[float, list[tuple[ir.Node, int]]]] = {}
        self.quantized: list[str] = []
        self.weights = 0

    def add(self, value: ir.Value, absmax: float, node: ir.Node, index: int) -> None:
        """`node` reads `value` quantised at its input `index`."""
        self.edges.setdefault(value, (absmax, []))[1].append((node, index))
        self.quantized.append(node.name or "")


def _scale_queries(model: ir.Model, one: PlannedAttention) -> tuple[ir.Value, float]:
    """Move the scale of the scores to the queries; the scaled queries and the magnitude of the factor."""
    query = one.values[0]
    if not one.attention.scalings:
        return query, 1.0
    (scaling,) = one.attention.scalings
    factor = scaling_factor(scaling) or 1.0
    number = constant(model, f"{scaling.name}.factor", np.asarray(factor, np.float32))
    multiply = ir.node("Mul", [query, number], name=f"{scaling.name}/queries")
    scaled = multiply.outputs[0]
    scaled.name, scaled.type, scaled.shape = f"{query.name}.scaled", query.type, query.shape
    model.graph.insert_before(one.attention.scores, [multiply])
    one.attention.scores.replace_input_with(0, scaled)
    ir.convenience.replace_all_uses_with(scaling.outputs[0], one.attention.scores.outputs[0])
    unused = scaling.inputs[1]
    model.graph.remove(scaling, safe=True)
    if unused is not None:
        drop_unused(model, unused)
    return scaled, abs(factor)
