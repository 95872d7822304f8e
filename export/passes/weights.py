"""Weights in the layout that the graph needs, computed on the way to the disk and not before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from .base import GraphPass

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def derived_initializer(
    model: ir.Model,
    name: str,
    source: ir.TensorProtocol,
    compute: Callable[[Array], Array],
    shape: Sequence[int],
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """An initializer whose bytes are ``compute(source)`` each time that they are asked for.

    Nothing is held between reading the source and writing the result, so deriving costs one tensor and not one model.
    ``dtype``: of the result; None for that of the source.
    """
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    kind = source.dtype if dtype is None else dtype

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(compute(source.numpy())), name=name)

    tensor = ir.LazyTensor(evaluate, dtype=kind, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def constant(model: ir.Model, name: str, values: Array) -> ir.Value:
    """A small initializer; one of that name that is there already is used again."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.Tensor(values, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


class TransposeWeights(GraphPass):
    """`Transpose(weight)` becomes a weight that is stored transposed.

    PyTorch's `Linear` holds `[out, in]`, ONNX's MatMul reads `[in, out]`.
    """

    name = "transpose-weights"

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace each such Transpose by an initializer derived from the weight."""
        found = [node for node in model.graph if _is_weight_transpose(node)]
        for node in found:
            weight = node.inputs[0]
            assert weight is not None
            assert weight.const_value is not None
            perm = tuple(node.attributes.get_ints("perm") or reversed(range(len(weight.const_value.shape))))
            stored = derived_initializer(
                model,
                f"{weight.name}.transposed",
                weight.const_value,
                lambda array, perm=perm: array.transpose(perm),  # type: ignore[misc]
                [weight.const_value.shape.numpy()[axis] for axis in perm],
            )
            ir.convenience.replace_all_uses_with(node.outputs[0], stored)
            model.graph.remove(node, safe=True)
            if not weight.uses():
                del model.graph.initializers[weight.name or ""]
        return model, bool(found)

    def ensures(self, model: ir.Model) -> str | None:
        """No Transpose of a weight is left."""
        left = [node.name for node in model.graph if _is_weight_transpose(node)]
        return f"weights are still transposed at run time by {left[:3]}" if left else None


def _is_weight_transpose(node: ir.Node) -> bool:
    if node.op_type != "Transpose" or node.domain != "":
        return False
    source = node.inputs[0]
    return source is not None and source.is_initializer() and source.const_value is not None
