"""Where tokens stand, for decoders that count it from the mask themselves, over a cache that is concatenated.

Graphs of `export/llm/seq2seq_graph.py` and `flamingo_graph.py` take a place of their buffer for a position: new tokens
begin at the row's length, and the key at place `t` is token `t`. With padding between prompt and answer neither holds.
"""

from __future__ import annotations

import onnx_ir as ir

from .base import GraphPass
from .match import producer
from .standard_decoder_mask import DecoderMask
from .standard_decoder_nodes import NodeWriter


def count_places(model: ir.Model, mask: DecoderMask) -> None:
    """Let the graph's own positions `[B, S]`, and the keys' in distances `[B, S, T]`, be those of `mask`."""
    for positions in _positions(model):
        readers = [node for node, _ in positions.uses()]
        for expanded in readers:
            if expanded.op_type == "Unsqueeze":
                _replace_keys(expanded.outputs[0], mask)
        ir.convenience.replace_all_uses_with(positions, mask.positions())


def _positions(model: ir.Model) -> list[ir.Value]:
    """`first + Range(S)`, where `first` is (the mask's row sums - S), or 0 in a prefill."""
    found = []
    for node in model.graph:
        if node.op_type == "Add" and producer(node.inputs[1], "Range") is not None and _is_first(node.inputs[0]):
            found.append(node.outputs[0])
    return found


def _is_first(value: ir.Value | None) -> bool:
    column = producer(value, "Unsqueeze")
    chosen = None if column is None else producer(column.inputs[0], "Mul")
    before = None if chosen is None else producer(chosen.inputs[0], "Sub")
    lengths = None if before is None else producer(before.inputs[0], "ReduceSum")
    source = None if lengths is None else lengths.inputs[0]
    return source is not None and source.name == "attention_mask"


def _replace_keys(queries: ir.Value, mask: DecoderMask) -> None:
    """`queries - Range(T)` becomes `queries - (the keys' positions)`."""
    for node, index in list(queries.uses()):
        if node.op_type == "Sub" and index == 0 and producer(node.inputs[1], "Range") is not None:
            node.replace_input_with(1, mask.key_positions())


class WholeNumberClip(GraphPass):
    """Clip of whole numbers as Max and Min: TensorRT's list has Clip for floating point alone."""

    name = "whole-number-clip"

    def requires(self, model: ir.Model) -> str | None:
        """There is one."""
        return None if _clips(model) else "no Clip of whole numbers"

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Each where it stands; a bound that is left out bounds nothing."""
        for node in _clips(model):
            write = NodeWriter(model, node, node.name or node.op_type)
            value = node.inputs[0]
            for at, op_type in ((1, "Max"), (2, "Min")):
                bound = node.inputs[at] if len(node.inputs) > at else None
                if value is not None and bound is not None:
                    value = write.add(op_type, op_type, [value, bound])
            if value is None or value is node.inputs[0]:
                continue
            old = node.outputs[0]
            name, old.name, value.shape = old.name, None, old.shape
            ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
            value.name = name
            model.graph.remove(node, safe=True)
        return model, True


def _clips(model: ir.Model) -> list[ir.Node]:
    whole = (ir.DataType.INT64, ir.DataType.INT32)
    return [
        node
        for node in model.graph
        if node.op_type == "Clip" and node.domain == "" and node.inputs[0] is not None and node.inputs[0].dtype in whole
    ]
