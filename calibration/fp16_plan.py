"""Which nodes of a graph compute in FP16, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from .fp16_operators import (
    EXACT,
    FLOAT16_FLUSHED,
    FLOAT16_MAX,
    FLOAT32_ONLY,
    PRODUCTS,
    STATISTIC_STEPS,
    activations,
    consumers,
    float_inputs,
    has_float_output,
    is_float,
    is_stored,
)


@dataclass(frozen=True)
class ConstantFacts:
    """`absmax`: largest magnitude, infinity included. `flushed`: share of its non-zero numbers that FP16 makes 0."""

    absmax: float
    flushed: float


@dataclass
class PrecisionPlan:
    """`half`: nodes that compute in FP16. `reasons`: name of an FP32 node -> why; `flushed`: weight -> share."""

    half: set[ir.Node] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    flushed: dict[str, float] = field(default_factory=dict)


def plan_precisions(
    model: ir.Model, keep: Mapping[str, str], islands: frozenset[str], half_io: frozenset[str]
) -> PrecisionPlan:
    """Decide for every node that reads or gives FP32 values.

    ``keep``: node name -> why it stays. ``islands``: operators that stay. ``half_io``: graph inputs and outputs that
    become FP16.
    """
    facts = {value.name or "": constant_facts(value) for value in _float_constants(model)}
    fixed = _fixed_nodes(model, keep, islands, facts)
    single = _absorb(model, fixed, half_io)
    plan = PrecisionPlan()
    for node in model.graph:
        if not float_inputs(node) and not has_float_output(node):
            continue
        if node in single:
            plan.reasons[node.name or ""] = fixed.get(node, "between FP32 nodes")
        elif has_float_output(node):
            plan.half.add(node)
    _place_readers(model, plan, single, half_io)
    read = {value.name or "" for node in plan.half for _, value in float_inputs(node)}
    plan.flushed = {name: fact.flushed for name, fact in facts.items() if name in read and fact.flushed > 0}
    return plan


def constant_facts(value: ir.Value) -> ConstantFacts:
    """Read one weight and let go of it."""
    tensor = value.const_value
    if tensor is None or tensor.size == 0:
        return ConstantFacts(0.0, 0.0)
    # onnx-ir maps the file: minimum and maximum make no copy, abs would.
    array = tensor.numpy()
    absmax = max(float(array.max()), -float(array.min()))
    small = (array < FLOAT16_FLUSHED) & (array > -FLOAT16_FLUSHED)
    lost = np.count_nonzero(small) - np.count_nonzero(array == 0)
    # Written so that NaN counts as too large.
    return ConstantFacts(absmax if absmax == absmax else np.inf, float(lost) / array.size)


def _float_constants(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.initializers.values() if is_float(value) and is_stored(value)]


def _fixed_nodes(
    model: ir.Model, keep: Mapping[str, str], islands: frozenset[str], facts: Mapping[str, ConstantFacts]
) -> dict[ir.Node, str]:
    """Nodes that are FP32 whatever stands around them -> why."""
    fixed: dict[ir.Node, str] = {}
    for node in model.graph:
        if not float_inputs(node) and not has_float_output(node):
            continue
        large = [value.name for _, value in float_inputs(node) if _is_large(value, facts)]
        if (node.name or "") in keep:
            fixed[node] = keep[node.name or ""]
        elif node.op_type in islands:
            fixed[node] = f"{node.op_type} is computed in FP32"
            _fix_statistic(node, fixed)
        elif node.op_type in FLOAT32_ONLY or (node.op_type == "Cast" and has_float_output(node)):
            fixed.setdefault(node, f"{node.op_type} gives FP32")
        elif large:
            fixed[node] = f"constant {large[0]} is beyond {FLOAT16_MAX:.0f}"
            if node.op_type not in PRODUCTS:
                _fix_large(node, fixed)
        if node.op_type in ("Cos", "Sin") and node in fixed:
            _fix_angles(node, fixed)
    return fixed


def _is_large(value: ir.Value, facts: Mapping[str, ConstantFacts]) -> bool:
    fact = facts.get(value.name or "")
    return fact is not None and not fact.absmax <= FLOAT16_MAX


def _fix_statistic(reduction: ir.Node, fixed: dict[ir.Node, str]) -> None:
    """From a mean or a sum on to the node that normalises with it: eps has no digits in FP16, 1 / sqrt(eps) few."""
    if not reduction.op_type.startswith("Reduce"):
        return
    seen = set(reduction.outputs)
    pending = list(reduction.outputs)
    while pending:
        for node in consumers(pending.pop()):
            if node.op_type not in STATISTIC_STEPS:
                continue
            fixed.setdefault(node, f"normalises with the {reduction.op_type} of {reduction.name}")
            joins = any(value not in seen for value in activations(node))
            if not joins:
                fresh = [value for value in node.outputs if value not in seen]
                seen.update(fresh)
                pending.extend(fresh)


def _fix_large(node: ir.Node, fixed: dict[ir.Node, str]) -> None:
    """On from a node that gives values beyond FP16 (a mask of -3.4e38) to where they are used up."""
    pending = list(node.outputs)
    while pending:
        for reader in consumers(pending.pop()):
            if reader in fixed or not (reader.op_type in EXACT or reader.op_type in ("Add", "Mul", "Min", "Max")):
                continue
            fixed[reader] = f"reads values beyond {FLOAT16_MAX:.0f} of {node.name}"
            pending.extend(reader.outputs)


def _fix_angles(node: ir.Node, fixed: dict[ir.Node, str]) -> None:
    """Back from a sine to the positions that its angle was computed from."""
    seen: set[ir.Node] = set()
    pending = activations(node)
    while pending:
        before = pending.pop().producer()
        if before is not None and before not in seen:
            seen.add(before)
            fixed.setdefault(before, f"computes the angle of {node.name}")
            pending.extend(activations(before))


def _absorb(model: ir.Model, fixed: Iterable[ir.Node], half_io: frozenset[str]) -> set[ir.Node]:
    """`fixed` and the nodes between them: all producers and all readers FP32, so FP16 would only add two Casts.

    Starts from every node that could be and takes away, so that a chain between two islands stays whole.
    """
    kept = set(fixed)
    candidates = [node for node in model.graph if node not in kept and has_float_output(node)]
    single = kept | {node for node in candidates if node.op_type not in PRODUCTS}
    changed = True
    while changed:
        changed = False
        for node in candidates:
            if node in single and not _is_between(node, single, half_io):
                single.remove(node)
                changed = True
    return _touching(kept, single)


def _touching(fixed: set[ir.Node], single: set[ir.Node]) -> set[ir.Node]:
    """Those of `single` that are connected with a fixed node: a table that is only looked up is near no island."""
    found, pending = set(fixed), list(fixed)
    while pending:
        node = pending.pop()
        around = [value.producer() for value in activations(node)]
        for other in (*around, *(reader for value in node.outputs for reader in consumers(value))):
            if other in single and other not in found:
                found.add(other)
                pending.append(other)
    return found


def _is_between(node: ir.Node, single: set[ir.Node], half_io: frozenset[str]) -> bool:
    for value in activations(node):
        producer = value.producer()
        if (producer is None and value.name in half_io) or (producer is not None and producer not in single):
            return False
    for value in node.outputs:
        if value.is_graph_output() and value.name in half_io:
            return False
        if any(has_float_output(reader) and reader not in single for reader in consumers(value)):
            return False
    return True


def _place_readers(model: ir.Model, plan: PrecisionPlan, single: set[ir.Node], half_io: frozenset[str]) -> None:
    """Nodes that read floats and give none (QuantizeLinear, comparisons, casts to integers) read what is there."""
    for node in model.graph:
        if node in single or has_float_output(node) or not float_inputs(node):
            continue
        sources = [(value, value.producer()) for value in activations(node)]
        if not sources:
            # A weight that is quantised in the graph: with what reads it.
            halved = any(reader in plan.half for value in node.outputs for reader in consumers(value))
        else:
            halved = all(
                producer in plan.half if producer is not None else value.name in half_io for value, producer in sources
            )
        if halved:
            plan.half.add(node)
