"""RMSNorm in standard operators: opset 20 has none, and engines fuse this form."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .base import GraphPass
from .gqa import CONTRIB
from .standard_decoder_nodes import NodeWriter
from .weights import constant

# Operators of ONNX Runtime. The first stands in the default domain, though ai.onnx has no such operator.
_NORM, _SKIP_NORM = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"


class ExplicitRmsNorm(GraphPass):
    """`x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019, arXiv 1910.07467) as Pow, ReduceMean, Add, Sqrt,
    Div and Mul; the sum with a skip connection before it becomes an Add.

    All but the Mul are statistics: in an FP16 graph they stay FP32.
    """

    name = "explicit-rms-norm"

    def requires(self, model: ir.Model) -> str | None:
        """Norms over the last axis whose statistics nobody reads."""
        for node in _norms(model):
            if node.op_type == _NORM and node.attributes.get_int("axis", -1) != -1:
                return f"{node.name} normalises over axis {node.attributes.get_int('axis')}, not over the last"
            if any(value.uses() for value in node.outputs[1:3]):
                return f"{node.name}: its mean or deviation is read"
        return None

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace each norm where it stands."""
        norms = _norms(model)
        for node in norms:
            self._replace(model, node)
        return model, bool(norms)

    def ensures(self, model: ir.Model) -> str | None:
        """None of ONNX Runtime's norms is left."""
        left = [node.name for node in _norms(model)]
        return f"{left[:3]} are left" if left else None

    def _replace(self, model: ir.Model, node: ir.Node) -> None:
        write = NodeWriter(model, node, node.name or node.op_type)
        skips = node.op_type == _SKIP_NORM
        states, gain = _given(node, 0), _given(node, 2 if skips else 1)
        if skips:
            for i, label in ((1, "Skip"), (3, "Bias")):
                if len(node.inputs) > i and node.inputs[i] is not None:
                    states = write.add("Add", label, [states, _given(node, i)])
            if len(node.outputs) > 3:
                _take_place(node.outputs[3], states)
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        eps = constant(model, f"rms_norm/epsilon_{epsilon:.9g}", np.array(epsilon, np.float32))
        two = constant(model, "rms_norm/two", np.array(2, np.float32))
        axis = constant(model, "rms_norm/axis", np.array([-1], np.int64))
        squares = write.add("Pow", "Pow", [states, two])
        mean = write.add("ReduceMean", "ReduceMean", [squares, axis], {"keepdims": 1})
        deviation = write.add("Sqrt", "Sqrt", [write.add("Add", "Add", [mean, eps])])
        normed = write.add("Div", "Div", [states, deviation])
        result = write.add("Mul", "Mul", [normed, gain])
        _take_place(node.outputs[0], result)
        model.graph.remove(node, safe=True)


def _take_place(old: ir.Value, new: ir.Value) -> None:
    """Let `new` be read where `old` is, under its name."""
    name, old.name = old.name, None
    new.shape = old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.name = name


def _norms(model: ir.Model) -> list[ir.Node]:
    kinds = ((_NORM, ""), (_NORM, CONTRIB), (_SKIP_NORM, CONTRIB))
    return [node for node in model.graph if (node.op_type, node.domain) in kinds]


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"{node.name}: input {index} is missing")
    return value
