"""GroupQueryAttention (com.microsoft, ContribOperators.md) as MatMul, Softmax, MatMul over a concatenated cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .base import GraphPass
from .gqa import CONTRIB
from .positions import POSITIONS
from .standard_decoder_mask import PREFIX, DecoderMask
from .standard_decoder_nodes import NodeWriter
from .standard_decoder_places import count_places
from .weights import constant

_OPERATOR = "GroupQueryAttention"
# Inputs of the operator, by index.
_QUERY, _KEY, _VALUE, _PAST_KEY, _PAST_VALUE, _COS, _SIN, _POSITIONS, _BIAS = 0, 1, 2, 3, 4, 7, 8, 9, 10
_READ = frozenset({"num_heads", "kv_num_heads", "scale", "local_window_size", "do_rotary"})
# Other attributes of the operator, and the value of each that asks for nothing.
_PLAIN: dict[str, tuple[float, ...]] = {
    "softcap": (0.0,),
    "smooth_softmax": (0, -1),
    "rotary_interleaved": (0,),
    "qk_output": (0,),
}


@dataclass(frozen=True)
class _Sizes:
    """Of one attention."""

    heads: int
    kv_heads: int
    head_size: int


class StandardAttention(GraphPass):
    """Rewrite every GroupQueryAttention; the cache grows by concatenation, and the mask says which places count.

    Positions that an earlier pass computed from the mask (`PositionsFromMask`) are computed anew: with padding inside
    the cache a token's place is no longer its position.
    """

    name = "standard-attention"
    mandatory = True

    def requires(self, model: ir.Model) -> str | None:
        """Operators without features that have no place in the rewrite, and the inputs that masks are made from."""
        nodes = _attentions(model)
        if not nodes:
            return f"the graph has no {_OPERATOR}"
        missing = {"attention_mask", "inputs_embeds"} - {value.name for value in model.graph.inputs}
        if missing:
            return f"the graph has no input {sorted(missing)}"
        return next((reason for node in nodes if (reason := _special(node)) is not None), None)

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Mask and positions once, then layer after layer."""
        mask = DecoderMask(model, next(iter(model.graph)))
        computed = next((v for node in model.graph for v in node.outputs if v.name == POSITIONS), None)
        if computed is not None:
            ir.convenience.replace_all_uses_with(computed, mask.positions())
        count_places(model, mask)
        tables: dict[tuple[str, str], tuple[ir.Value, ir.Value]] = {}
        for node in _attentions(model):
            _Rewrite(model, node, mask, tables).run()
        RemoveUnusedNodesPass()(model)
        return model, True

    def ensures(self, model: ir.Model) -> str | None:
        """None is left, and nothing else reads the mask: it would take places of the cache for positions."""
        if left := [node.name for node in _attentions(model)]:
            return f"{left[:3]} are left"
        mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
        readers = [node for node, _ in mask.uses() if node.op_type != "Shape"]
        other = [node.name for node in readers if not (node.name or "").startswith(f"{PREFIX}/")]
        return f"{other[:3]} read the mask by themselves" if other else None


class _Rewrite:
    """One node. `tables`: cosine and sine of the new tokens' positions, for those who read the same table."""

    def __init__(
        self,
        model: ir.Model,
        node: ir.Node,
        mask: DecoderMask,
        tables: dict[tuple[str, str], tuple[ir.Value, ir.Value]],
    ) -> None:
        self.model, self.node, self.mask, self.tables = model, node, mask, tables
        self.write = NodeWriter(model, node, node.name or _OPERATOR)
        past = _input(node, _PAST_KEY)
        heads, kv_heads = (node.attributes.get_int(name) for name in ("num_heads", "kv_num_heads"))
        self.sizes = _Sizes(heads, kv_heads, int(past.shape[3]))  # type: ignore[index, arg-type]

    def run(self) -> None:
        """Put the nodes in, and the operator out."""
        node, sizes, add = self.node, self.sizes, self.write.add
        query, key, value = self._heads()
        if node.attributes.get_int("do_rotary", 0):
            query, key = self._turn(query, "query"), self._turn(key, "key")
        keys = add("Concat", "present_key", [_input(node, _PAST_KEY), key], {"axis": 2})
        values = add("Concat", "present_value", [_input(node, _PAST_VALUE), value], {"axis": 2})
        scale = node.attributes.get_float("scale", 0.0) or sizes.head_size**-0.5
        scaled = add("Mul", "scaled", [query, self._constant("scale", np.array(scale, np.float32))])
        turned = add("Transpose", "keys", [self._repeat(keys, "key")], {"perm": [0, 1, 3, 2]})
        scores = add("MatMul", "scores", [scaled, turned])
        if (bias := _optional(node, _BIAS)) is not None:
            scores = add("Add", "biased", [scores, bias])
        scores = add("Add", "masked", [scores, self.mask.bias(node.attributes.get_int("local_window_size", -1))])
        weights = add("Softmax", "Softmax", [scores], {"axis": -1})
        attended = add("MatMul", "attended", [weights, self._repeat(values, "value")])
        merged = add("Transpose", "merge/Transpose", [attended], {"perm": [0, 2, 1, 3]})
        shape = self._shape("merge", 0, 0, sizes.heads * sizes.head_size)
        self._finish(add("Reshape", "merge/Reshape", [merged, shape]), keys, values)

    def _heads(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Query, key and value of the new tokens, `[B, heads, S, head_size]`; one input may hold all three."""
        node, sizes = self.node, self.sizes
        counts = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        if _optional(node, _KEY) is None:
            widths = np.array([count * sizes.head_size for count in counts], np.int64)
            parts = self.write.add_many(
                "Split", "Split", [_input(node, _QUERY), self._constant("widths", widths)], 3, {"axis": 2}
            )
        else:
            parts = [_input(node, index) for index in (_QUERY, _KEY, _VALUE)]
        names = ("query", "key", "value")
        query, key, value = (self._split(*each) for each in zip(parts, counts, names, strict=True))
        return query, key, value

    def _split(self, states: ir.Value, heads: int, name: str) -> ir.Value:
        shape = self._shape(f"{heads}_heads", 0, 0, heads, self.sizes.head_size)
        split = self.write.add("Reshape", f"{name}/Reshape", [states, shape])
        return self.write.add("Transpose", f"{name}/Transpose", [split], {"perm": [0, 2, 1, 3]})

    def _turn(self, states: ir.Value, name: str) -> ir.Value:
        """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves as pairs; what is beyond stays."""
        add, cos, sin = self.write.add, *self._tables()
        turned = 2 * int(_input(self.node, _COS).shape[1])  # type: ignore[index, arg-type]
        half, rest = turned // 2, self.sizes.head_size - turned
        sizes = self._constant("parts", np.array([half, half, rest] if rest else [half, half], np.int64))
        left, right, *beyond = self.write.add_many(
            "Split", f"{name}/Split", [states, sizes], 3 if rest else 2, {"axis": 3}
        )
        first = add(
            "Sub",
            f"{name}/first",
            [self._times(left, cos, name, "left_cos"), self._times(right, sin, name, "right_sin")],
        )
        second = add(
            "Add",
            f"{name}/second",
            [self._times(right, cos, name, "right_cos"), self._times(left, sin, name, "left_sin")],
        )
        return add("Concat", f"{name}/turned", [first, second, *beyond], {"axis": 3})

    def _times(self, states: ir.Value, table: ir.Value, name: str, label: str) -> ir.Value:
        return self.write.add("Mul", f"{name}/{label}", [states, table])

    def _tables(self) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine `[B, 1, S, half]` of the new tokens."""
        cos, sin = _input(self.node, _COS), _input(self.node, _SIN)
        positions = _optional(self.node, _POSITIONS) or self.mask.positions()
        key = (f"{cos.name} {sin.name}", positions.name or "")
        if key not in self.tables:
            axis = self._constant("heads_axis", np.array([1], np.int64))
            rows = [
                self.write.add("Gather", f"{label}/Gather", [table, positions], {"axis": 0})
                for label, table in (("cos", cos), ("sin", sin))
            ]
            self.tables[key] = (
                self.write.add("Unsqueeze", "cos/Unsqueeze", [rows[0], axis]),
                self.write.add("Unsqueeze", "sin/Unsqueeze", [rows[1], axis]),
            )
        return self.tables[key]

    def _repeat(self, states: ir.Value, name: str) -> ir.Value:
        """`[B, kv_heads, T, head_size]` with each head as often as queries share it."""
        heads, kv_heads, head_size = self.sizes.heads, self.sizes.kv_heads, self.sizes.head_size
        if heads == kv_heads:
            return states
        add, axis = self.write.add, self._constant("group_axis", np.array([2], np.int64))
        apart = add("Unsqueeze", f"{name}/groups", [states, axis])
        expanded = add("Expand", f"{name}/Expand", [apart, self._shape("groups", 1, 1, heads // kv_heads, 1, 1)])
        return add("Reshape", f"{name}/repeated", [expanded, self._shape("repeated", 0, heads, -1, head_size)])

    def _finish(self, attended: ir.Value, keys: ir.Value, values: ir.Value) -> None:
        graph, node = self.model.graph, self.node
        batch = graph.inputs[0].shape[0] if graph.inputs[0].shape is not None else "batch"
        total = next(value for value in graph.inputs if value.name == "attention_mask").shape
        shape = ir.Shape([batch, self.sizes.kv_heads, total[1] if total is not None else None, self.sizes.head_size])
        for old, new in zip(node.outputs, (attended, keys, values), strict=False):
            name, old.name = old.name, None
            new.shape = old.shape if new is attended else shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            new.name = name
        graph.remove(node, safe=True)

    def _shape(self, name: str, *sizes: int) -> ir.Value:
        return self._constant(f"shape_{name}", np.array(sizes, np.int64))

    def _constant(self, name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
        return constant(self.model, f"{self.write.prefix}/{name}", values)


def _attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == _OPERATOR and node.domain == CONTRIB]


def _special(node: ir.Node) -> str | None:
    """None, or what the node asks for that the rewrite does not compute."""
    for name, attribute in node.attributes.items():
        if name not in _READ and attribute.value not in _PLAIN.get(name, ()):
            return f"{node.name} has {name} {attribute.value}"
    if any(value is not None for value in node.inputs[_BIAS + 1 :]):
        return f"{node.name} has inputs beyond the attention bias"
    past = node.inputs[_PAST_KEY]
    if past is None or past.shape is None or not isinstance(past.shape[3], int):
        return f"{node.name} has no past of a known head size"
    return None


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"{node.name}: input {index} is missing")
    return value


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None
