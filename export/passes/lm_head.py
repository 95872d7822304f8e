"""The LM head runs on one position of each row."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .base import GraphPass
from .match import constant_of
from .weights import constant

POSITION = "logits_position"
_HEADS = ("MatMul", "MatMulNBits", "Gemm")


class GatherLogitsPosition(GraphPass):
    """Add the input `logits_position` `[B]` and read the LM head there: `logits` is `[B, V]` and not `[B, S, V]`.

    Sampling needs one position. For a prompt of S tokens the head over all of them costs S times as much, and its
    result (S times the vocabulary, in FP32) is often larger than all other activations together.
    """

    name = "gather-logits-position"
    mandatory = True

    def requires(self, model: ir.Model) -> str | None:
        """`logits` must come from a projection by a constant weight."""
        if any(value.name == POSITION for value in model.graph.inputs):
            return f"the graph has an input {POSITION} already"
        return None if _head(model) is not None else "logits do not come from one projection"

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Insert `GatherND` (batch_dims 1) before the head."""
        head = _head(model)
        assert head is not None
        hidden = head.inputs[0]
        assert hidden is not None
        batch = model.graph.inputs[0].shape[0] if model.graph.inputs[0].shape is not None else "batch"
        position = ir.Value(name=POSITION, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([batch]))
        model.graph.inputs.append(position)
        axis = constant(model, f"{POSITION}/axis", np.array([1], np.int64))
        index = ir.node("Unsqueeze", [position, axis], name=f"{POSITION}/Unsqueeze")
        gather = ir.node("GatherND", [hidden, index.outputs[0]], {"batch_dims": 1}, name=f"{POSITION}/GatherND")
        for node in (index, gather):
            node.outputs[0].name = f"{node.name}/output"
            model.graph.insert_before(head, node)
        gather.outputs[0].type = hidden.type
        head.replace_input_with(0, gather.outputs[0])
        logits = _logits(model)
        width = logits.shape[-1] if logits.shape is not None else "vocab"
        for value in _between(head, logits):
            value.shape = ir.Shape([batch, width])
        return model, True

    def ensures(self, model: ir.Model) -> str | None:
        """The input is there and `logits` has two axes."""
        logits = _logits(model)
        rank = len(logits.shape) if logits.shape is not None else None
        return None if rank == 2 else f"logits have {rank} axes"


def _logits(model: ir.Model) -> ir.Value:
    return next(value for value in model.graph.outputs if value.name == "logits")


def _head(model: ir.Model) -> ir.Node | None:
    """The node that multiplies by the head's weight: behind `logits`, a bias between them allowed."""
    node = _logits(model).producer()
    if node is not None and node.op_type == "Add":
        value = next((v for v in node.inputs if constant_of(v) is None), None)
        node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in _HEADS else None


def _between(head: ir.Node, logits: ir.Value) -> list[ir.Value]:
    return [head.outputs[0]] if head.outputs[0] is logits else [head.outputs[0], logits]
