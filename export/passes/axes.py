"""One set of axis names in every graph: those of the stage's contract."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from .base import GraphPass

Dims = tuple[int | str, ...]


class NameAxes(GraphPass):
    """Write the contract's axis names on the inputs and outputs, and rename the same symbols inside the graph.

    A size that the contract calls dynamic and the graph has fixed is not renamed: `ensures` reports it.
    """

    name = "name-axes"
    mandatory = True

    def __init__(self, shapes: Mapping[str, Dims]) -> None:
        self.shapes = dict(shapes)

    def requires(self, model: ir.Model) -> str | None:
        """The graph's inputs and outputs must be those of the contract."""
        names = {value.name or "" for value in (*model.graph.inputs, *model.graph.outputs)}
        if names != set(self.shapes):
            return f"inputs and outputs are {sorted(names)}, the contract has {sorted(self.shapes)}"
        return None

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Rename symbols everywhere, then set the ends."""
        renamed = self._renamed_symbols(model)
        for node in model.graph:
            for value in node.outputs:
                if value.shape is not None:
                    value.shape = _rename(value.shape, renamed)
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.shape = self._shape(value)
        return model, True

    def ensures(self, model: ir.Model) -> str | None:
        """Every end has the contract's shape."""
        for value in (*model.graph.inputs, *model.graph.outputs):
            got = dims(value)
            if got != self.shapes[value.name or ""]:
                return f"{value.name} is {list(got or ())}, the contract has {list(self.shapes[value.name or ''])}"
        return None

    def _renamed_symbols(self, model: ir.Model) -> dict[str, int | str]:
        renamed: dict[str, int | str] = {}
        for value in model.graph.inputs:
            for old, new in zip(dims(value) or (), self.shapes[value.name or ""], strict=False):
                if isinstance(old, str) and renamed.setdefault(old, new) != new:
                    # One symbol for two axes: the trace took them for the same, and running other sizes will tell.
                    continue
        return renamed

    def _shape(self, value: ir.Value) -> ir.Shape:
        wanted, got = self.shapes[value.name or ""], dims(value)
        if got is None or len(got) != len(wanted):
            return ir.Shape(wanted)
        # A fixed size stays, so that a baked axis shows.
        return ir.Shape(
            [
                old if isinstance(old, int) and isinstance(new, str) else new
                for old, new in zip(got, wanted, strict=True)
            ]
        )


def dims(value: ir.Value) -> Dims | None:
    """Sizes and symbols of a value; None when its rank is unknown."""
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else (dim.value or "") for dim in value.shape)


def _rename(shape: ir.Shape, renamed: Mapping[str, int | str]) -> ir.Shape:
    return ir.Shape([dim if isinstance(dim, int) else renamed.get(dim.value or "", dim.value) for dim in shape])
