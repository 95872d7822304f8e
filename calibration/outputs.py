"""NaN, infinity and overflow in what a graph computes, with the first node that is to blame."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..errors import CheckFailed
from .fp16_emulate import computing_node
from .fp16_operators import is_float
from .linears import layer_of
from .tapped import Feed, TappedGraph, load_computed, open_values

_VALUES_PER_RUN = 64


@dataclass(frozen=True)
class NonFinite:
    """The first value in the order of the graph that holds a NaN or an infinity. `found`: "nan", "inf" or "-inf";
    `where`: the index of the first one; `sample`: the number of the sample, from 0.
    """

    sample: int
    node: str
    op_type: str
    layer: str
    value: str
    found: str
    where: tuple[int, ...]

    def as_text(self) -> str:
        """One line."""
        return (
            f"{self.value}, which {self.op_type} {self.node} computes in {self.layer}, is {self.found} at "
            f"{list(self.where)} of sample {self.sample}"
        )


def find_nonfinite(graph: Path, inputs: Iterable[Feed], *, intermediates: bool = False) -> NonFinite | None:
    """Run `graph` on every one of `inputs`; None when all outputs are finite.

    When one is not, that sample runs again with all values as outputs, and the first in the order of the graph is
    returned. ``intermediates``: look at every value of every sample (an infinity may vanish on its way, in a softmax).
    FP16 is rounded as an accelerator does it, so what passes 65504 is found without one.
    """
    session = None if intermediates else open_values(graph)
    for index, feed in enumerate(inputs):
        if session is not None and all(_first_bad(array) is None for array in session(feed).values()):
            continue
        found = _first_in_order(graph, feed, index)
        if found is not None:
            return found
    return None


def require_finite(graph: Path, inputs: Iterable[Feed], *, stage: str, intermediates: bool = False) -> None:
    """Raise CheckFailed, naming the first node, when `find_nonfinite` finds something."""
    found = find_nonfinite(graph, inputs, intermediates=intermediates)
    if found is not None:
        raise CheckFailed(
            f"stage {stage}: {found.as_text()}; keep that node in FP32, or look at the input if FP32 has it too"
        )


def _first_in_order(graph: Path, feed: Feed, sample: int) -> NonFinite | None:
    values = _floats(load_computed(graph))
    names = list(values)
    for start in range(0, len(names), _VALUES_PER_RUN):
        part = names[start : start + _VALUES_PER_RUN]
        arrays = TappedGraph(load_computed(graph), graph.parent, part)(feed)
        for name in part:
            where = _first_bad(arrays[name])
            if where is not None:
                node = computing_node(values[name]) or values[name].producer()
                assert node is not None
                kind = str(arrays[name][where])
                return NonFinite(sample, node.name or "", node.op_type, layer_of(node), name, kind, where)
    return None


def _floats(model: ir.Model) -> dict[str, ir.Value]:
    """Every float that a node computes, by name, in the order of the graph."""
    return {value.name: value for node in model.graph for value in node.outputs if value.name and is_float(value)}


def _first_bad(array: NDArray[Any]) -> tuple[int, ...] | None:
    if not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all():
        return None
    return tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
