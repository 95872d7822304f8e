"""Graphs run for their insides: any values as outputs, FP16 rounded as an accelerator rounds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..runtime.parity.drill import GraphRun
from .fp16_emulate import emulate_float16, has_float16
from .fp16_types import fill_types

Feed = Mapping[str, NDArray[Any]]
REFERENCE = ".reference"  # suffix of inputs that replace a value


def load_computed(graph: Path) -> ir.Model:
    """The graph with the types of all values known; one with FP16 in it becomes its FP32 emulation."""
    model = ir.load(graph)
    fill_types(model)
    return emulate_float16(model) if has_float16(model) else model


class TappedGraph:
    """A session of `model`, whose weights lie in `folder`, that gives `values`, nothing fused.

    Floats are cast to the types of the graph's inputs, so one feed serves graphs of both precisions; what the graph
    does not take is left out.
    """

    def __init__(self, model: ir.Model, folder: Path, values: Sequence[str]) -> None:
        self._run = GraphRun(ir.to_proto(model), folder, values)
        self._dtypes = {
            value.name or "": value.dtype.numpy() for value in model.graph.inputs if value.dtype is not None
        }

    def __call__(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """The values by name. Raises EngineError when the graph does not run on `feed`."""
        return self._run({name: self._cast(name, array) for name, array in feed.items() if name in self._dtypes})

    def _cast(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        if np.issubdtype(array.dtype, np.floating):
            return np.asarray(array, dtype=self._dtypes[name])
        return array


def open_values(graph: Path, values: Sequence[str] | None = None) -> TappedGraph:
    """The graph at `graph` with `values` (its outputs, for None) to be had."""
    model = load_computed(graph)
    names = [value.name or "" for value in model.graph.outputs] if values is None else values
    return TappedGraph(model, graph.parent, names)


def cut_graph(model: ir.Model, cuts: Iterable[str], values: Sequence[str]) -> tuple[ir.Model, tuple[str, ...]]:
    """Keep what computes `values`; what it reads of `cuts` comes from new inputs `NAME.reference`.

    Returns the model and the names of the cuts that it reads, so that each part between cuts runs on what it is given
    and not on what the parts before made of it.
    """
    wanted, found = set(values), {value.name or "": value for node in model.graph for value in node.outputs}
    made = {}
    for name in cuts:
        value = found[name]
        fed = ir.Value(name=f"{name}{REFERENCE}", type=value.type, shape=value.shape)
        for node, index in tuple(value.uses()):
            node.replace_input_with(index, fed)
        made[name] = fed
    model.graph.outputs.clear()
    model.graph.outputs.extend(found[name] for name in values if name in wanted)
    model.graph.inputs.extend(made.values())
    RemoveUnusedNodesPass()(model)
    read = tuple(name for name, fed in made.items() if fed.uses())
    for fed in made.values():
        if not fed.uses():
            model.graph.inputs.remove(fed)
    return model, read
