"""Values that smoothing scaled: they have their old names and other numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir

# `FoldSmoothing` names the weights that it derives `WEIGHT.smoothed.ACTIVATION`; other passes may add to the end.
_WEIGHT = re.compile(r".*?\.smoothed\.(.+)")


def smoothed_values(model: ir.Model) -> set[str]:
    """Names of the values between a weight that smoothing divided and the activation that it scaled, both included."""
    values = {value.name or "": value for node in model.graph for value in node.outputs}
    found: set[str] = set()
    for name, weight in model.graph.initializers.items():
        match = _WEIGHT.fullmatch(name)
        if match is None:
            continue
        activation = _longest(match[1], values)
        if activation is not None:
            before = _ancestors(activation)
            starts = [node for node, _ in weight.uses() if node in before]
            found |= _between(starts, before)
    return found


def _longest(text: str, values: Mapping[str, ir.Value]) -> ir.Value | None:
    """The value whose name `text` begins with, up to a dot."""
    while text and text not in values:
        text = text.rpartition(".")[0]
    return values.get(text)


def _ancestors(value: ir.Value) -> set[ir.Node]:
    seen: set[ir.Node] = set()
    pending = [value]
    while pending:
        node = pending.pop().producer()
        if node is not None and node not in seen:
            seen.add(node)
            pending.extend(one for one in node.inputs if one is not None)
    return seen


def _between(starts: list[ir.Node], before: set[ir.Node]) -> set[str]:
    found: set[str] = set()
    pending = list(starts)
    while pending:
        for value in pending.pop().outputs:
            if value.name and value.name not in found:
                found.add(value.name)
                pending.extend(node for node, _ in value.uses() if node in before)
    return found
