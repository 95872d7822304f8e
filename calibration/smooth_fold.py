"""Scales of smoothed groups into the weights of a graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ..export.passes import GraphPass
from ..export.passes.modules import SCOPES
from ..export.passes.weights import constant, derived_initializer
from .records import FloatArray
from .smooth_groups import ChannelWeight, SmoothGroup, find_groups


class FoldSmoothing(GraphPass):
    """Divide activations by `scales` (name of the activation -> `s`, float32 `[C]`) and multiply their weights.

    The new weights are derived on the way to the disk, one tensor at a time. Weights that others read too are left to
    them. `outputs`: name of the activation -> name of what its products read now (the same, except behind a new Mul).
    """

    name = "fold-smoothing"

    def __init__(self, scales: Mapping[str, FloatArray]) -> None:
        self.scales = dict(scales)
        self._nodes: dict[str, tuple[str, ...]] = {}
        self.outputs: dict[str, str] = {}

    def requires(self, model: ir.Model) -> str | None:
        """There must be a scale, and each must belong to a group of the graph."""
        if not self.scales:
            return "no group is better smoothed"
        unknown = set(self.scales) - {group.name for group in find_groups(model)}
        return f"no product with a weight reads {sorted(unknown)[:3]}" if unknown else None

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Fold each scale, and drop the weights that nothing reads any more."""
        for group in [group for group in find_groups(model) if group.name in self.scales]:
            scale = self.scales[group.name]
            self.outputs[group.name], self._nodes[group.name] = group.name, group.nodes
            if group.kind == "mul":
                self.outputs[group.name] = _insert_mul(model, group, scale)
            for weight in group.divided:
                _multiply(model, group, weight, 1.0 / scale)
            for weight in group.products:
                _multiply(model, group, weight, scale)
        return model, bool(self.scales)

    def ensures(self, model: ir.Model) -> str | None:
        """The products of a scaled group, and no others, read its scaled activation."""
        read = {group.name: group.nodes for group in find_groups(model)}
        for before, after in self.outputs.items():
            if read.get(after) != self._nodes[before]:
                return f"{after} is read by {read.get(after)}, not by {self._nodes[before]}"
        return None


def _multiply(model: ir.Model, group: SmoothGroup, place: ChannelWeight, factor: FloatArray) -> None:
    """The input at `place` becomes an initializer that is `factor` times as large along its axis."""
    old = place.value
    source = old.const_value
    if source is None or old.shape is None:  # ChannelWeight.value has looked
        raise ValueError(f"{old.name} is no initializer")
    dims = [1] * len(old.shape)
    dims[place.axis] = factor.size
    shaped = factor.reshape(dims)
    new = derived_initializer(
        model,
        f"{old.name}.smoothed.{group.name}",
        source,
        lambda array: np.multiply(array, shaped, dtype=np.float32).astype(array.dtype),
        old.shape.numpy(),
    )
    place.node.replace_input_with(place.index, new)
    if not old.uses() and not old.is_graph_output():
        del model.graph.initializers[old.name or ""]


def _insert_mul(model: ir.Model, group: SmoothGroup, scale: FloatArray) -> str:
    """The products read `X * (1 / s)`; the others that read `X` keep it."""
    factor = constant(model, f"{group.name}/smooth/factor", np.asarray(1.0 / scale, dtype=np.float32))
    node = ir.node("Mul", [group.value, factor], name=f"{group.name}/smooth")
    made, first = node.outputs[0], group.products[0].node
    made.name, made.type, made.shape = f"{group.name}/smooth/output", group.value.type, group.value.shape
    if SCOPES in first.metadata_props:
        node.metadata_props[SCOPES] = first.metadata_props[SCOPES]
    model.graph.insert_before(first, [node])
    for weight in group.products:
        weight.node.replace_input_with(0, made)
    return made.name
