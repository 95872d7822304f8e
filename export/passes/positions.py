"""Positions of a decoder's tokens, computed from the attention mask inside the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .base import GraphPass
from .weights import constant

# Name of the value that `PositionsFromMask` computes.
POSITIONS = "positions/cut/output"


class PositionsFromMask(GraphPass):
    """The input `position_ids` `[B, S]` is computed from `attention_mask` `[B, total]` and goes.

    Rows are padded on the right, so the tokens of a prefill (`S == total`) count from 0; in a later step the last of
    a row's `S` tokens stands at `sum(mask) - 1`. Positions of padding are cut to ``max_positions - 1``: nothing reads
    what is computed there, but the lookup must stay in its table.
    """

    name = "positions-from-mask"
    mandatory = True

    def __init__(self, max_positions: int) -> None:
        self.max_positions = max_positions

    def requires(self, model: ir.Model) -> str | None:
        """The three inputs must be there."""
        names = {value.name for value in model.graph.inputs}
        missing = {"position_ids", "attention_mask", "inputs_embeds"} - names
        return f"the graph has no input {sorted(missing)}" if missing else None

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Compute the positions before the first node."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        positions = inputs["position_ids"]
        computed = self._positions(model, inputs["attention_mask"], inputs["inputs_embeds"])
        computed.type, computed.shape = positions.type, positions.shape
        ir.convenience.replace_all_uses_with(positions, computed)
        graph.inputs.remove(positions)
        return model, True

    def ensures(self, model: ir.Model) -> str | None:
        """The input is gone."""
        return "position_ids is still an input" if any(v.name == "position_ids" for v in model.graph.inputs) else None

    def _positions(self, model: ir.Model, mask: ir.Value, embeds: ir.Value) -> ir.Value:
        first = next(iter(model.graph))

        def add(op_type: str, label: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
            node = ir.node(op_type, inputs, attributes, name=f"positions/{label}")
            node.outputs[0].name = f"positions/{label}/output"
            model.graph.insert_before(first, node)
            return node.outputs[0]

        zero = constant(model, "positions/zero", np.array(0, np.int64))
        one = constant(model, "positions/one", np.array(1, np.int64))
        axis = constant(model, "positions/axis", np.array([1], np.int64))
        last = constant(model, "positions/last", np.array(self.max_positions - 1, np.int64))
        lengths = add("ReduceSum", "lengths", [mask, axis], keepdims=1)
        tokens = add("Squeeze", "tokens", [add("Shape", "tokens_shape", [embeds], start=1, end=2)])
        total = add("Squeeze", "total", [add("Shape", "total_shape", [mask], start=1, end=2)])
        prefill = add("Equal", "prefill", [tokens, total])
        past = add("Where", "past", [prefill, zero, add("Sub", "before", [lengths, tokens])])
        offsets = add("Range", "offsets", [zero, tokens, one])
        return add("Min", "cut", [add("Add", "add", [past, offsets]), last])
