"""Control flow, and shapes that are known only when the data is.

Sources: onnx-tensorrt's operators.md (Loop, If, TopK) and its importers; TensorRT developer guide, "Dynamic shapes".
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ...calibration.placement.patterns import is_constant, origin
from ...calibration.rules_graph import constant_numbers, name_of, rank_of
from . import tables
from .findings import Finding
from .subject import STANDARD, Subject

_DATA_DEPENDENT = ("NonZero", "NonMaxSuppression", "Compress", "Unique")
# Inputs that are shapes, lengths or positions: what they are must be known before anything runs.
_SHAPE_INPUTS: dict[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Tile": (1,),
    "Slice": (1, 2, 4),
    "Pad": (1,),
    "Resize": (2, 3),
}
_ENDLESS = 2**31 - 1
_NO_GRAPH = "no CUDA graph can be captured"


def check_control_flow(subject: Subject) -> Iterator[Finding]:
    """Loops with a known number of rounds, branches with equal ranks."""
    for node in subject.standard("Loop"):
        yield from _check_loop(subject, node)
    for node in subject.standard("If"):
        yield from _check_if(subject, node)
    for node in subject.standard("Loop", "Scan", "If"):
        if node.op_type != "If" or not is_constant(node.inputs[0]):
            why = f"{node.op_type} decides at run time: {_NO_GRAPH}"
            yield subject.finding("control-flow", "note", name_of(node), why, "unroll it if a CUDA graph matters")


def check_top_k(subject: Subject) -> Iterator[Finding]:
    """K is a constant below the limit."""
    limit = tables.limits()["top_k"]["below"]
    for node in subject.standard("TopK"):
        k = _top_k(node)
        if k is None:
            why = f"TopK with K computed at run time: from {limit} on it fails there, and {_NO_GRAPH}"
            yield subject.finding("topk", "warning", name_of(node), why, "export with a fixed K")
        elif k >= limit:
            why = f"TopK with K={k}: the parser takes less than {limit}"
            yield subject.finding("topk", "error", name_of(node), why, "sort outside of the engine, or lower K")


def check_data_dependence(subject: Subject) -> Iterator[Finding]:
    """No size depends on the numbers that come in."""
    for node in subject.standard(*_DATA_DEPENDENT):
        if tables.operator_status(node.op_type, subject.version) == "accepted":
            why = f"{node.op_type} gives as many elements as the data has: needs an output allocator, and {_NO_GRAPH}"
            fix = "write it with masks of a fixed size (Where)"
            yield subject.finding("data-dependent", "warning", name_of(node), why, fix)
    inputs = set(subject.model.graph.inputs)
    for node in subject.standard(*_SHAPE_INPUTS):
        for index in _SHAPE_INPUTS[node.op_type]:
            source = _value_source(node.inputs[index] if index < len(node.inputs) else None, inputs)
            if source is not None:
                why = f"a size in the graph is computed from the numbers of the input {source}"
                fix = "give the size as the length of an axis; else the profile must state its values (set_shape_input)"
                yield subject.finding("shape-tensor", "warning", name_of(node), why, fix)
                break


def _check_loop(subject: Subject, node: ir.Node) -> Iterator[Finding]:
    body = node.attributes["body"].as_graph()
    carried = len(node.inputs) - 2
    scans = len(node.outputs) - carried
    rounds = _rounds(node)
    fixed = rounds is not None and not _condition_changes(node, body)
    name = name_of(node)
    if scans > 0 and not fixed:
        why = f"Loop with {scans} scan outputs and {_what_is_open(node, rounds)}: their length must be known"
        fix = "give the trip count as a constant and leave the condition out, or unroll the loop"
        yield subject.finding("loop", "error", name, why, fix)
    elif not fixed and _given(node, 0) is None:
        why = "Loop without trip count: the engine asks the condition in every round, on the host"
        yield subject.finding("loop", "warning", name, why, "give the trip count, or unroll the loop")
    elif _condition_changes(node, body) and _given(node, 0) is not None:
        why = "Loop with a trip count and a condition: the parser warns, and takes both"
        yield subject.finding("loop", "warning", name, why, "leave one of them out")
    for index in range(carried):
        yield from _check_carried(subject, node, body, index)


def _check_carried(subject: Subject, node: ir.Node, body: ir.Graph, index: int) -> Iterator[Finding]:
    """A carried value has one shape in all rounds."""
    result = body.outputs[1 + index]
    for start in (node.inputs[2 + index], body.inputs[2 + index]):
        if start is None or start.shape is None or result.shape is None:
            continue
        pairs = zip(start.shape, result.shape, strict=False)
        if len(start.shape) != len(result.shape) or any(
            isinstance(one, int) and isinstance(other, int) and one != other for one, other in pairs
        ):
            why = f"Loop carries {result.name} as {_shape(start)} in and {_shape(result)} out: its shape must stay"
            fix = "write into a buffer of the full size (ScatterElements, Where)"
            yield subject.finding("loop", "error", name_of(node), why, fix)
            return


def _check_if(subject: Subject, node: ir.Node) -> Iterator[Finding]:
    if is_constant(node.inputs[0]):
        return  # The parser reads one branch only.
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    counts = [len(branch.outputs) for branch in branches]
    if counts[0] != counts[1]:
        why = f"If with {counts[0]} outputs in one branch and {counts[1]} in the other"
        yield subject.finding("if", "error", name_of(node), why, "give both branches the same outputs")
        return
    for one, other in zip(branches[0].outputs, branches[1].outputs, strict=True):
        ranks = (rank_of(one), rank_of(other))
        if None not in ranks and ranks[0] != ranks[1]:
            why = f"If whose branches give {one.name} with rank {ranks[0]} and {other.name} with rank {ranks[1]}"
            yield subject.finding("if", "error", name_of(node), why, "reshape both to one rank, or compute without If")


def _rounds(node: ir.Node) -> int | None:
    """The trip count; None when it is absent, computed or endless."""
    numbers = constant_numbers(_given(node, 0))
    if numbers is None or numbers.size != 1:
        return None
    count = int(numbers.reshape(-1)[0])
    return count if count < _ENDLESS else None


def _condition_changes(node: ir.Node, body: ir.Graph) -> bool:
    """Whether the loop may end before its trip count: the condition is not passed on as it came, nor constant."""
    result = origin(body.outputs[0])
    if result is None or is_constant(result):
        return False
    if result is body.inputs[1]:
        start = _given(node, 1)
        return start is not None and not is_constant(origin(start))
    return True


def _what_is_open(node: ir.Node, rounds: int | None) -> str:
    if _given(node, 0) is None:
        return "no trip count"
    return "a trip count that is no constant" if rounds is None else "a condition that can end it"


def _top_k(node: ir.Node) -> int | None:
    if (attribute := node.attributes.get("k")) is not None:
        return attribute.as_int()
    numbers = constant_numbers(_given(node, 1))
    return None if numbers is None else int(numbers.reshape(-1)[0])


def _value_source(value: ir.Value | None, inputs: set[ir.Value]) -> str | None:
    """The graph input whose numbers (not shape) `value` is computed from."""
    queue, seen = [value], set()
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if current in inputs and not current.is_initializer():
            return current.name
        producer = current.producer()
        if producer is None or (
            producer.domain in STANDARD and producer.op_type in ("Shape", "Size", *_DATA_DEPENDENT)
        ):
            continue
        queue.extend(producer.inputs)
    return None


def _given(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _shape(value: ir.Value) -> str:
    return "?" if value.shape is None else str([str(dim) for dim in value.shape]).replace("'", "")
