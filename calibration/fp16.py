"""FP32 graphs to FP16, with FP32 islands and every Cast in the graph.

Types in the graph and not in a build flag: engines that choose types themselves put norms and softmax into FP16, which
breaks vision transformers without an error. What leaves FP16's range or its digits is found by `choose_float32_nodes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..export.passes import GraphPass
from ..export.passes.modules import SCOPES
from .fp16_choose import choose_float32_nodes, watched_values
from .fp16_operators import ISLANDS, consumers, float_inputs, has_float_output, is_float, is_stored
from .fp16_plan import PrecisionPlan, plan_precisions
from .fp16_types import fill_types
from .fp16_weights import WeightForms

__all__ = ["Float16Report", "ToFloat16", "choose_float32_nodes", "watched_values"]

_HALF, _SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_SUFFIX = {_HALF: "float16", _SINGLE: "float32"}


@dataclass(frozen=True)
class Float16Report:
    """What `ToFloat16` did.

    `half`: how many nodes compute in FP16. `float32`: node -> why it stays FP32. `casts`: how many Casts were added.
    `flushed`: weight -> share of its non-zero numbers that became 0, where that is more than `FLUSHED_SHARE`.
    """

    half: int
    float32: Mapping[str, str]
    casts: int
    flushed: Mapping[str, float]


# A random normal weight loses fewer than one in 1e5; more says that its scale does not fit FP16.
FLUSHED_SHARE = 1e-3


class ToFloat16(GraphPass):
    """Compute in FP16, except `keep`, `islands`, and what would overflow by a constant.

    ``keep``: names of nodes that stay FP32, or a mapping name -> why. Inputs and outputs of the graph stay FP32 with a
    Cast inside (``keep_io``), but those in ``half_io`` (the key/value cache) become FP16. Names of values stay with
    the node that computes them; a Cast gives ``NAME.float16`` or ``NAME.float32``. Works on Q/DQ graphs: the scale of a
    QuantizeLinear has the type of its input, that of a DequantizeLinear the type of its output. `report` has what was
    done.
    """

    name = "to-float16"
    mandatory = True

    def __init__(
        self,
        keep: Iterable[str] | Mapping[str, str] = (),
        *,
        keep_io: bool = True,
        half_io: Iterable[str] = (),
        islands: frozenset[str] = ISLANDS,
    ) -> None:
        self.keep = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(keep, "asked for")
        self.keep_io = keep_io
        self.half_io = frozenset(half_io)
        self.islands = islands
        self.report = Float16Report(0, {}, 0, {})

    def requires(self, model: ir.Model) -> str | None:
        """One flat graph, FP32, that knows the nodes and ends it was asked about."""
        names = {node.name for node in model.graph}
        if unknown := sorted(set(self.keep) - names):
            return f"the graph has no node {unknown[0]}, which is to stay FP32"
        ends = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
        if unknown := sorted(self.half_io - ends):
            return f"the graph has no input or output {unknown[0]}, which is to be FP16"
        for node in model.graph:
            if any(one.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for one in node.attributes.values()):
                return f"{node.name} is {node.op_type} with a subgraph; export without control flow"
            cache = [value.name for value in (*node.inputs, *node.outputs) if value and value.name in self.half_io]
            if node.name in self.keep and cache:
                return (
                    f"{node.name} is to stay FP32, but its cache {cache[0]} is FP16 and shared between past and present"
                )
        if model.functions:
            return "it has local functions; inline them first"
        if not any(is_float(value) for value in (*model.graph.inputs, *model.graph.initializers.values())):
            return "nothing in it is FP32"
        return None

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Decide, convert weights, then set types and insert Casts."""
        _lift_constants(model)
        fill_types(model)
        half_io = self._half_ends(model)
        plan = plan_precisions(model, self.keep, self.islands, half_io)
        _convert_weights(model, plan)
        _set_types(model, plan, half_io)
        casts = _Casts(model)
        for node in list(model.graph):
            casts.connect(node, half=node in plan.half)
        casts.close(half_io)
        flushed = {name: share for name, share in plan.flushed.items() if share > FLUSHED_SHARE}
        self.report = Float16Report(len(plan.half), plan.reasons, casts.added, flushed)
        return model, bool(plan.half)

    def ensures(self, model: ir.Model) -> str | None:
        """Ends have the types that were asked for and every node reads one float type."""
        half_io = self._half_ends(model)
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.dtype == (_SINGLE if value.name in half_io else _HALF):
                return f"{value.name} is {value.dtype}"
        for node in model.graph:
            kinds = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None and v.dtype in (_HALF, _SINGLE)}
            if len(kinds) > 1 and node.op_type not in ("Cast", "Resize"):
                return f"{node.name} ({node.op_type}) mixes FP16 and FP32"
        return None

    def _half_ends(self, model: ir.Model) -> frozenset[str]:
        if self.keep_io:
            return self.half_io
        return frozenset(
            value.name or "" for value in (*model.graph.inputs, *model.graph.outputs) if value.dtype in (_HALF, _SINGLE)
        )


def _lift_constants(model: ir.Model) -> None:
    """Constant nodes of floats become initializers, which can be stored in either type."""
    for node in list(model.graph):
        value = node.outputs[0]
        if node.op_type != "Constant" or node.domain != "" or value.is_graph_output():
            continue
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None or tensor.dtype != _SINGLE:
            continue
        stored = ir.Value(name=value.name, type=ir.TensorType(_SINGLE), const_value=tensor)
        stored.shape = ir.Shape(tensor.shape.numpy())
        ir.convenience.replace_all_uses_with(value, stored)
        model.graph.remove(node, safe=True)
        model.graph.register_initializer(stored)


def _convert_weights(model: ir.Model, plan: PrecisionPlan) -> None:
    forms = WeightForms()
    for node in model.graph:
        scaled = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for index, value in float_inputs(node):
            if not is_stored(value):
                continue
            if node in plan.half:
                forms.request(node, index, "half-scale" if scaled and index == 1 else "half")
            elif node.op_type == "QuantizeLinear" and index == 1 and _feeds_half(node, plan):
                # Both ends of the pair must mean the same number, or every value is off by the scale's rounding.
                forms.request(node, index, "rounded")
    forms.apply(model)


def _feeds_half(quantize: ir.Node, plan: PrecisionPlan) -> bool:
    return any(reader in plan.half for reader in consumers(quantize.outputs[0]))


def _set_types(model: ir.Model, plan: PrecisionPlan, half_io: frozenset[str]) -> None:
    """Types of all computed values, before any Cast."""
    for value in model.graph.inputs:
        if value.name in half_io and is_float(value):
            value.type = ir.TensorType(_HALF)
    for node in model.graph:
        if node not in plan.half or not has_float_output(node):
            continue
        if node.op_type == "ConstantOfShape":
            fill = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(fill.astype(np.float16)))
        for value in node.outputs:
            if is_float(value):
                value.type = ir.TensorType(_HALF)


class _Casts:
    """One Cast for each value and type, right after what computes the value."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.added = 0

    def connect(self, node: ir.Node, *, half: bool) -> None:
        """Give `node` its inputs in the type that it computes in."""
        want, other = (_HALF, _SINGLE) if half else (_SINGLE, _HALF)
        if node.op_type == "Cast":
            return
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != other or (node.op_type == "Resize" and index in (1, 2)):
                continue
            node.replace_input_with(index, self._cast(value, want))

    def close(self, half_io: frozenset[str]) -> None:
        """Graph outputs: the Cast takes the output's name, the value inside gets another."""
        graph = self._model.graph
        for index, value in enumerate(graph.outputs):
            want = _HALF if value.name in half_io else _SINGLE
            if value.dtype not in (_HALF, _SINGLE) or value.dtype == want:
                continue
            name = value.name or ""
            made = self._cast(value, want)
            value.name = f"{name}.{_SUFFIX[value.dtype]}"
            made.name = name
            graph.outputs[index] = made

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        made = self._made.get((value, to))
        if made is None:
            made = self._made[value, to] = insert_cast(self._model, value, to)
            self.added += 1
        return made


def insert_cast(model: ir.Model, value: ir.Value, to: ir.DataType, suffix: str | None = None) -> ir.Value:
    """A Cast of `value`, right after the node that computes it; returns the Cast's output."""
    name = f"{value.name}.{suffix or _SUFFIX[to]}"
    node = ir.node("Cast", [value], {"to": int(to)}, name=f"{name}/Cast")
    made = node.outputs[0]
    made.name, made.type, made.shape = name, ir.TensorType(to), value.shape
    producer = value.producer()
    if producer is None:
        first = next(iter(model.graph))
        model.graph.insert_before(first, node)
    else:
        if SCOPES in producer.metadata_props:
            node.metadata_props[SCOPES] = producer.metadata_props[SCOPES]
        model.graph.insert_after(producer, node)
    return made
