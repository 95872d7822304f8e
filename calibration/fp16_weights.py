"""Weights of nodes that compute in FP16, converted on the way to the disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import onnx_ir as ir

from ..export.passes.weights import Array, derived_initializer

# "half": FP16. "half-scale": FP16, never 0. "rounded": FP32 that holds FP16's number, for a scale whose partner is
# FP16.
Form = Literal["half", "half-scale", "rounded"]
_SMALLEST = np.float16(2.0**-24)


class WeightForms:
    """Collects who reads which form of which initializer, then writes every form once.

    An initializer that is read in one form only keeps its name.
    """

    def __init__(self) -> None:
        self._wanted: dict[ir.Value, dict[Form, list[tuple[ir.Node, int]]]] = {}

    def request(self, node: ir.Node, index: int, form: Form) -> None:
        """Input `index` of `node` will read its initializer in that form."""
        value = node.inputs[index]
        assert value is not None
        self._wanted.setdefault(value, {}).setdefault(form, []).append((node, index))

    def apply(self, model: ir.Model) -> None:
        """Convert, and connect the readers."""
        for value, forms in self._wanted.items():
            if "half-scale" in forms and "half" in forms:  # one stored form of a scale
                forms["half-scale"].extend(forms.pop("half"))
            readers = sum(len(places) for places in forms.values())
            if len(forms) == 1 and readers == len(value.uses()) and not value.is_graph_output():
                _convert_in_place(value, next(iter(forms)))
                continue
            for form, places in forms.items():
                stored = _derived(model, value, form)
                for node, index in places:
                    node.replace_input_with(index, stored)
            if not value.uses() and not value.is_graph_output():
                del model.graph.initializers[value.name or ""]


def _compute(form: Form) -> Callable[[Array], Array]:
    return {"half": to_half, "half-scale": scale_to_half, "rounded": _rounded_scale}[form]


def _dtype(form: Form) -> ir.DataType:
    return ir.DataType.FLOAT if form == "rounded" else ir.DataType.FLOAT16


def _derived(model: ir.Model, value: ir.Value, form: Form) -> ir.Value:
    assert value.const_value is not None
    shape = value.const_value.shape.numpy()
    return derived_initializer(
        model, f"{value.name}.{form}", value.const_value, _compute(form), shape, dtype=_dtype(form)
    )


def _convert_in_place(value: ir.Value, form: Form) -> None:
    source, compute, name = value.const_value, _compute(form), value.name
    assert source is not None

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(compute(source.numpy())), name=name)

    value.const_value = ir.LazyTensor(evaluate, dtype=_dtype(form), shape=ir.Shape(source.shape.numpy()), name=name)
    value.type = ir.TensorType(_dtype(form))


def to_half(array: Array) -> Array:
    """To FP16, nearest even."""
    return np.asarray(array, dtype=np.float16)


def scale_to_half(array: Array) -> Array:
    """A scale in FP16: positive scales stay positive, because a scale of 0 is refused by engines."""
    half = to_half(array)
    return np.where((half == 0) & (array != 0), _SMALLEST, half)


def _rounded_scale(array: Array) -> Array:
    return scale_to_half(array).astype(np.float32)
