"""A changed graph against the one that it was made from: how far its outputs are off, and which layer is to blame.

Values are matched by name. So a pass that keeps what a value means must keep its name, and one that changes what it
means must give it another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..errors import InputError
from ..runtime.parity.metrics import Difference, compare, worst_of
from .fp16_operators import EXACT, is_float
from .linears import layer_of
from .smoothed import smoothed_values
from .tapped import REFERENCE, Feed, TappedGraph, cut_graph, load_computed, open_values

# Layer outputs that are held at once. Those of a ViT-L are 1 to 4 MB each for one picture.
VALUES_PER_RUN = 64
_MOVED = EXACT | {"Cast", "Constant", "QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class LayerDifference:
    """A value of `layer` that both graphs compute, the last one before another layer follows; worst over all samples.

    A layer that goes on after another (an addition behind it) has several. `difference`: everything before computed by
    the candidate, so errors have piled up. `isolated`: this layer alone by the candidate, on what the reference
    computed before it.
    """

    layer: str
    node: str
    op_type: str
    value: str
    difference: Difference
    isolated: Difference

    @property
    def jump(self) -> float:
        """The error that this layer adds by itself, relative to its value: the larger of the mean error and of the turn
        of the worst token, infinite for NaN.
        """
        turn = math.sqrt(max(0.0, 2.0 * (1.0 - self.isolated.min_token_cosine)))
        return max(self.isolated.mean_rel, turn)


def compare_graphs(
    reference: Path,
    candidate: Path,
    inputs: Iterable[Feed],
    *,
    values: Sequence[str] | None = None,
    values_per_run: int = VALUES_PER_RUN,
) -> tuple[LayerDifference, ...]:
    """Layer by layer, in the order of the graph; see `blame` for the one that adds most.

    ``inputs``: a few samples, input name -> array; all are held in memory. ``values``: names to compare instead of the
    last ones of each layer. At most ``values_per_run`` of them, and what computes them reads, are held at once; FP16 is
    rounded as an accelerator does it.

    Raises InputError when there are no inputs, or nothing to compare.
    """
    feeds = list(inputs)
    if not feeds:
        raise InputError("no inputs to compare graphs on; give one sample at least")
    nodes = _shared_nodes(load_computed(reference), load_computed(candidate), values)
    if not nodes:
        raise InputError(f"{candidate} and {reference} have no computed value of the same name; compare their outputs")
    names = list(nodes)
    found: list[LayerDifference] = []
    for start in range(0, len(names), values_per_run):
        part = names[start : start + values_per_run]
        chained, isolated = _compare_part(reference, candidate, feeds, names, part)
        for name in part:
            node = nodes[name]
            found.append(
                LayerDifference(layer_of(node), node.name or "", node.op_type, name, chained[name], isolated[name])
            )
    return tuple(found)


def blame(layers: Iterable[LayerDifference]) -> LayerDifference | None:
    """The layer that adds the largest error by itself; of equal ones the first. None when there are none."""
    return max(layers, key=lambda one: one.jump, default=None)


def stage_difference(
    reference: Path, candidate: Path, inputs: Iterable[Feed], *, outputs: Sequence[str] | None = None
) -> Difference:
    """The worst difference of the graphs' outputs over all of `inputs`, which are read once, one at a time.

    Both graphs are computed without fusions, FP16 rounded as an accelerator does it: ONNX Runtime's CPU provider would
    hide what overflows there. ``outputs``: None for every output of floats that both have.

    Raises InputError when there are no inputs or no common outputs.
    """
    names = _common_outputs(reference, candidate) if outputs is None else list(outputs)
    if not names:
        raise InputError(f"{candidate} and {reference} have no output of floats in common")
    one, other = open_values(reference, names), open_values(candidate, names)
    worst: Difference | None = None
    for feed in inputs:
        expected, actual = one(feed), other(feed)
        found = worst_of([compare(expected[name], actual[name]) for name in names])
        worst = found if worst is None else worst_of([worst, found])
    if worst is None:
        raise InputError("no inputs to compare graphs on; give one sample at least")
    return worst


def worst_token_cosine(reference: NDArray[Any], actual: NDArray[Any]) -> float:
    """The smallest cosine of any slice along the last axis, -1 when `actual` is not finite."""
    return compare(reference, actual).min_token_cosine


def _common_outputs(reference: Path, candidate: Path) -> list[str]:
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    other = {value.name for value in ir.load(candidate).graph.outputs}
    return [
        value.name
        for value in ir.load(reference).graph.outputs
        if value.name and value.name in other and value.dtype in floats
    ]


def _shared_nodes(reference: ir.Model, candidate: ir.Model, values: Sequence[str] | None) -> dict[str, ir.Node]:
    """Value -> the reference's node that computes it, for values that mean the same in both graphs: the last one before
    the nodes of another layer follow.
    """
    both = _floats(candidate) - smoothed_values(candidate)
    shared = {name: node for name, node in _computed(reference).items() if name in both}
    if values is not None:
        if missing := [name for name in values if name not in shared]:
            raise InputError(f"{missing[0]!r} is not a float that both graphs compute; name other values")
        return {name: shared[name] for name in values}
    names = [*shared, None]
    ends = zip(shared, names[1:], strict=True)
    return {
        name: shared[name] for name, after in ends if after is None or layer_of(shared[name]) != layer_of(shared[after])
    }


def _computed(model: ir.Model) -> dict[str, ir.Node]:
    """Names of floats that are computed from the inputs, and the nodes that do it, in order."""
    reached = set(model.graph.inputs)
    found = {}
    for node in model.graph:
        if any(value in reached for value in node.inputs):
            reached.update(node.outputs)
            if node.op_type not in _MOVED:
                found.update({value.name: node for value in node.outputs if value.name and is_float(value)})
    return found


def _floats(model: ir.Model) -> set[str]:
    return {value.name for node in model.graph for value in node.outputs if value.name and is_float(value)}


Worst = Mapping[str, Difference]


def _compare_part(
    reference: Path, candidate: Path, feeds: Sequence[Feed], cuts: Sequence[str], part: Sequence[str]
) -> tuple[Worst, Worst]:
    """Both differences of the values in `part`, every value in `cuts` given to what reads it."""
    model, read = cut_graph(load_computed(candidate), cuts, part)
    alone = TappedGraph(model, candidate.parent, part)
    expected = open_values(reference, [*part, *(name for name in read if name not in part)])
    actual = open_values(candidate, part)
    chained: dict[str, Difference] = {}
    isolated: dict[str, Difference] = {}
    for feed in feeds:
        values = expected(feed)
        given = {f"{name}{REFERENCE}": np.asarray(values[name], np.float32) for name in read}
        for results, worst in ((actual(feed), chained), (alone({**feed, **given}), isolated)):
            for name in part:
                found = compare(values[name], results[name])
                worst[name] = worst_of([worst[name], found]) if name in worst else found
    return chained, isolated
