"""UINT8 activations and INT8 weights as QuantizeLinear and DequantizeLinear of the standard: nothing contributed.

ONNX Runtime fuses the products; OpenVINO keeps whole stretches of the graph in 8 bits. For its fused attention Q, K
and V are symmetric: a zero point there costs it a pass of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...export.passes.modules import SCOPES
from ...export.passes.weights import constant
from ..records import TensorRange
from .attention import find_attentions
from .base import drop_unused
from .cpu_parts import LinearPart, WeightFormat, find_linear_parts, insert_behind, store_weight, uint8_grid


def place_qdq(
    model: ir.Model,
    ranges: Mapping[str, TensorRange],
    weights: WeightFormat,
    *,
    keep: frozenset[str],
    attention: bool,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Insert the pairs; names of the products in INT8, and of the softmaxes around which attention is."""
    work = _Work(model, ranges)
    quantized, fused = [], []
    for part in find_linear_parts(model):
        if part.node.name not in keep:
            quantized.append(part.node.name or "")
            _place_linear(work, part, weights)
    for one in find_attentions(model) if attention else ():
        if {one.scores.name, one.mix.name} & keep or one.guards:
            continue
        for node in (one.scores, one.mix):
            for index, value in enumerate(node.inputs):
                if value is not None:
                    node.replace_input_with(index, work.pair(value, signed=value is not one.mix.inputs[0]))
        quantized += [one.scores.name or "", one.mix.name or ""]
        fused.append(one.softmax.name or "")
    return tuple(quantized), tuple(fused)


def _place_linear(work: _Work, part: LinearPart, weights: WeightFormat) -> None:
    stored, scale = store_weight(work.model, part.weight, weights)
    columns = int(scale.const_value.shape.numpy()[0]) if scale.const_value is not None else 0
    zero = constant(work.model, f"zero_point.int8.{columns}", np.zeros(columns, np.int8))
    node = ir.node("DequantizeLinear", [stored, scale, zero], {"axis": 1}, name=f"{part.node.name}/DequantizeLinear")
    node.outputs[0].name, node.outputs[0].type = f"{part.node.name}.weight", part.weight.type
    node.outputs[0].shape = part.weight.shape
    if SCOPES in part.node.metadata_props:
        node.metadata_props[SCOPES] = part.node.metadata_props[SCOPES]
    work.model.graph.insert_before(part.node, [node])
    part.node.replace_input_with(0, work.pair(part.x, signed=False))
    part.node.replace_input_with(1, node.outputs[0])
    drop_unused(work.model, part.weight)


class _Work:
    """Pairs that are there already, so that all readers of a value share one."""

    def __init__(self, model: ir.Model, ranges: Mapping[str, TensorRange]) -> None:
        self.model = model
        self._ranges = ranges
        self._pairs: dict[tuple[ir.Value, bool], ir.Value] = {}

    def pair(self, value: ir.Value, *, signed: bool) -> ir.Value:
        """`value` through QuantizeLinear and DequantizeLinear, symmetric INT8 or UINT8."""
        if (value, signed) not in self._pairs:
            kind = "int8" if signed else "uint8"
            scale, zero = self._grid(value.name or "", signed=signed)
            step = constant(self.model, f"{value.name}.{kind}.scale", scale)
            point = constant(self.model, f"{value.name}.{kind}.zero_point", zero)
            q = ir.node("QuantizeLinear", [value, step, point], name=f"{value.name}/{kind}/QuantizeLinear")
            q.outputs[0].name, q.outputs[0].shape = f"{value.name}.{kind}", value.shape
            q.outputs[0].type = ir.TensorType(ir.DataType.INT8 if signed else ir.DataType.UINT8)
            dq = ir.node("DequantizeLinear", [q.outputs[0], step, point], name=f"{value.name}/{kind}/DequantizeLinear")
            dq.outputs[0].name, dq.outputs[0].shape = f"{value.name}.{kind}.dequantized", value.shape
            dq.outputs[0].type = value.type
            insert_behind(self.model, value, [q, dq])
            self._pairs[value, signed] = dq.outputs[0]
        return self._pairs[value, signed]

    def _grid(self, name: str, *, signed: bool) -> tuple[NDArray[np.float32], NDArray[np.integer]]:
        found = self._ranges.get(name)
        scale, zero = uint8_grid(name, found)
        if not signed or found is None:
            return scale, zero
        return np.array(found.absmax / 127.0 or 1.0, np.float32), np.array(0, np.int8)
