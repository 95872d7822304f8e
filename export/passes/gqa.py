"""Attention over a concatenated cache becomes GroupQueryAttention over a shared buffer.

A traced decoder writes `present = Concat(past, new)` and attends with a mask that it builds from positions: the cache
is copied whole for every token. ONNX Runtime's GroupQueryAttention (com.microsoft, ContribOperators.md) writes the new
keys and values into the past's own buffer and takes each row's length, so rows of different lengths share a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .base import GraphPass
from .match import constant_of, only_consumer, permutation, producer
from .modules import SCOPES
from .weights import constant

CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class _Attention:
    """One attention: the softmax in the middle, states as `[B, heads, S, size]`, and where its output is read."""

    softmax: ir.Node
    query: ir.Value
    key: ir.Node  # Concat(past, new)
    value: ir.Node
    scale: float
    output: ir.Value  # [B, S, heads * size]

    @property
    def past_key(self) -> str:
        """Name of the input that holds this layer's past keys."""
        past = self.key.inputs[0]
        return "" if past is None else past.name or ""


class GroupQueryAttention(GraphPass):
    """Rewrite every cached attention of a decoder.

    ``num_heads``, ``kv_heads`` and ``head_size`` are those of the model; ``attention_mask`` `[B, total]` must be an
    input. Row lengths are the sums of its rows. ``windows``: for layers with sliding-window attention, the name of the
    past keys -> how many tokens a token sees, itself among them; the traced mask is dropped whole, windows included.
    """

    name = "group-query-attention"
    mandatory = True

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        kv_heads: int,
        head_size: int,
        windows: Mapping[str, int] | None = None,
    ) -> None:
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.kv_heads = kv_heads
        self.head_size = head_size
        self.windows = dict(windows or {})

    def requires(self, model: ir.Model) -> str | None:
        """One cached attention for each layer, and the mask."""
        if self.head_size % 8:
            return f"the head size is {self.head_size}; GroupQueryAttention takes multiples of 8"
        if not any(value.name == "attention_mask" for value in model.graph.inputs):
            return "the graph has no input attention_mask"
        matches = _matches(model)
        if len(matches) != self.num_layers:
            return f"{len(matches)} cached attentions found, {self.num_layers} expected"
        unknown = sorted(set(self.windows) - {match.past_key for match in matches})
        return f"no attention reads {unknown[0]}, which has a window" if unknown else None

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Insert the row lengths once, then one GroupQueryAttention for each layer."""
        matches = _matches(model)
        lengths = row_lengths(model)
        for match in matches:
            self._rewrite(model, match, lengths)
        RemoveUnusedNodesPass()(model)
        model.graph.opset_imports[CONTRIB] = 1
        model.graph.sort()
        return model, bool(matches)

    def ensures(self, model: ir.Model) -> str | None:
        """No cache is concatenated, no softmax is left, and each layer has its operator."""
        left = [node.name for node in model.graph if node.op_type == "Softmax"]
        if left or _matches(model):
            return f"attention is left at {left[:3]}"
        count = sum(node.op_type == "GroupQueryAttention" for node in model.graph)
        return None if count == self.num_layers else f"{count} GroupQueryAttention for {self.num_layers} layers"

    def _rewrite(self, model: ir.Model, match: _Attention, lengths: tuple[ir.Value, ir.Value]) -> None:
        anchor = match.softmax
        query, scale = _unscaled(_flat_states(model, match.query, self.num_heads * self.head_size, anchor))
        past_key, new_key = match.key.inputs
        past_value, new_value = match.value.inputs
        key = _flat_states(model, new_key, self.kv_heads * self.head_size, anchor)
        value = _flat_states(model, new_value, self.kv_heads * self.head_size, anchor)
        node = ir.node(
            "GroupQueryAttention",
            [query, key, value, past_key, past_value, *lengths],
            {
                "num_heads": self.num_heads,
                "kv_num_heads": self.kv_heads,
                "scale": scale * match.scale,
                "local_window_size": self.windows.get(match.past_key, -1),
            },
            domain=CONTRIB,
            num_outputs=3,
            name=f"{anchor.name}/GroupQueryAttention",
            metadata_props={SCOPES: anchor.metadata_props[SCOPES]} if SCOPES in anchor.metadata_props else None,
        )
        model.graph.insert_before(anchor, node)
        attended, present_key, present_value = node.outputs
        attended.name = f"{anchor.name}_attended"
        attended.type, attended.shape = match.output.type, match.output.shape
        ir.convenience.replace_all_uses_with(match.output, attended)
        for old, new in ((match.key.outputs[0], present_key), (match.value.outputs[0], present_value)):
            _move_output(model, old, new)


def row_lengths(model: ir.Model) -> tuple[ir.Value, ir.Value]:
    """`(seqlens_k, total_sequence_length)`: int32 `[B]`, each row's last position, and int32 scalar, from the mask."""
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    axis = constant(model, "row_lengths/axis", np.array([1], np.int64))
    one = constant(model, "row_lengths/one", np.array(1, np.int64))
    total = ir.node("ReduceSum", [mask, axis], {"keepdims": 0}, name="row_lengths/ReduceSum")
    last = ir.node("Sub", [total.outputs[0], one], name="row_lengths/Sub")
    seqlens = ir.node("Cast", [last.outputs[0]], {"to": ir.DataType.INT32}, name="row_lengths/Cast")
    width = ir.node("Shape", [mask], {"start": 1, "end": 2}, name="row_lengths/Shape")
    scalar = ir.node("Squeeze", [width.outputs[0]], name="row_lengths/Squeeze")
    length = ir.node("Cast", [scalar.outputs[0]], {"to": ir.DataType.INT32}, name="row_lengths/TotalCast")
    first = next(iter(model.graph))
    for node in (total, last, seqlens, width, scalar, length):
        node.outputs[0].name = f"{node.name}/output"
        model.graph.insert_before(first, node)
    return seqlens.outputs[0], length.outputs[0]


def _matches(model: ir.Model) -> list[_Attention]:
    softmaxes = (node for node in model.graph if node.op_type == "Softmax" and node.domain == "")
    return [match for node in softmaxes if (match := _match(node)) is not None]


def _match(softmax: ir.Node) -> _Attention | None:
    scores, scale = softmax.inputs[0], 1.0
    # scores = [mask +] [scale *] (query @ key^T); the query itself may have been scaled before.
    while (node := producer(scores, "Add") or producer(scores, "Mul")) is not None:
        number = next((c for v in node.inputs if (c := constant_of(v)) is not None and c.size == 1), None)
        if node.op_type == "Mul":
            if number is None:
                return None
            scale *= float(number.reshape(()))
            scores = next(v for v in node.inputs if constant_of(v) is None)
        else:
            scores = next((v for v in node.inputs if producer(v, "MatMul") or producer(v, "Mul")), None)
    product = producer(scores, "MatMul")
    attend = only_consumer(softmax.outputs[0])
    if product is None or attend is None or attend.op_type != "MatMul":
        return None
    key, value = _cache(product.inputs[1]), _cache(attend.inputs[1])
    transpose = only_consumer(attend.outputs[0])
    merge = only_consumer(transpose.outputs[0]) if transpose is not None else None
    if key is None or value is None or transpose is None or merge is None or product.inputs[0] is None:
        return None
    if permutation(transpose) != (0, 2, 1, 3) or merge.op_type != "Reshape":
        return None
    return _Attention(softmax, product.inputs[0], key, value, scale, merge.outputs[0])


def _cache(value: ir.Value | None) -> ir.Node | None:
    """`Concat(past, new)` behind the repetition over heads and the transpose that read it; `past` is a graph input."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Concat":
            past = node.inputs[0]
            cached = len(node.inputs) == 2 and past is not None and past.is_graph_input()
            return node if cached and node.attributes.get_int("axis", 0) in (2, -2) else None
        if node.op_type not in ("Transpose", "Reshape", "Expand", "Unsqueeze"):
            return None
        value = node.inputs[0]
    return None


def _flat_states(model: ir.Model, states: ir.Value | None, width: int, anchor: ir.Node) -> ir.Value:
    """`[B, heads, S, size]` as `[B, S, heads * size]`: what was reshaped and transposed before, or moved anew."""
    assert states is not None
    transpose = producer(states, "Transpose")
    reshape = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is not None and reshape is not None and permutation(transpose) == (0, 2, 1, 3):
        flat = reshape.inputs[0]
        if flat is not None and flat.shape is not None and len(flat.shape) == 3 and flat.shape[2] == width:
            return flat
    move = ir.node("Transpose", [states], {"perm": [0, 2, 1, 3]}, name=f"{states.name}/Transpose")
    shape = constant(model, f"shape_0_0_{width}", np.array([0, 0, width], np.int64))
    merge = ir.node("Reshape", [move.outputs[0], shape], name=f"{states.name}/Reshape")
    for node in (move, merge):
        node.outputs[0].name = f"{node.name}/output"
        node.outputs[0].type = states.type
        node.metadata_props.update({SCOPES: anchor.metadata_props.get(SCOPES, "['']")})
        model.graph.insert_before(anchor, node)
    return merge.outputs[0]


def _unscaled(query: ir.Value) -> tuple[ir.Value, float]:
    """The query before a multiplication by one number, and that number: the operator scales by itself."""
    node = producer(query, "Mul")
    if node is not None:
        for number, value in (node.inputs, node.inputs[::-1]):
            array = constant_of(number)
            if array is not None and array.size == 1 and value is not None:
                return value, float(array.reshape(()))
    return query, 1.0


def _move_output(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Make `new` the graph output that `old` is."""
    name = old.name
    old.name = f"{name}/concatenated"
    new.name, new.type, new.shape = name, old.type, old.shape
    outputs = model.graph.outputs
    outputs[list(outputs).index(old)] = new
