"""Rewrites that `preflight --fix` applies to one graph; each keeps what the graph computes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ...calibration.placement.patterns import infer_types
from ...calibration.rules_graph import dtype_of
from ..passes import GraphPass
from ..passes.standard_decoder_places import WholeNumberClip
from .constants import FP16_MASK, constants_of, role_of
from .subject import STANDARD

# exp(-1e4) is an exact 0 in every float type, and two such masks together stay within FP16.
MASK = -1e4
_ISLANDS = frozenset(
    {
        "LayerNormalization",
        "RMSNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "Softmax",
        "LogSoftmax",
    }
)
_SINGLE, _HALF, _DOUBLE = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE


def repair_passes() -> tuple[GraphPass, ...]:
    """In order: functions inlined, masks, types, operators, islands."""
    return (FoldFunctions(), LowerMasks(), DoubleToFloat(), WholeNumberClip(), Float32Islands())


class FoldFunctions(GraphPass):
    """Inline local functions."""

    name = "inline-functions"

    def requires(self, model: ir.Model) -> str | None:
        """There is a local function."""
        return None if model.functions else "no local functions"

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Every call becomes the function's nodes."""
        from onnx_ir.passes.common import InlinePass

        return InlinePass()(model).model, True


class LowerMasks(GraphPass):
    """Masks of -inf, of the smallest FP32 and of the smallest FP16 number become -1e4."""

    name = "lower-masks"

    def requires(self, model: ir.Model) -> str | None:
        """A constant that large leads to a softmax."""
        return None if any(_masks(model)) else "no mask below -6e4"

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Replace the numbers; shapes and types stay."""
        found = list(_masks(model))
        for value, tensor in found:
            array = tensor.numpy()
            lowered = np.where(array <= FP16_MASK, np.asarray(MASK, array.dtype), array).astype(array.dtype)
            _store(value, ir.tensor(lowered, name=tensor.name))
        return model, bool(found)

    def ensures(self, model: ir.Model) -> str | None:
        """None is left."""
        left = [value.name for value, _ in _masks(model)]
        return f"{left[0]} is still below -6e4" if left else None


class DoubleToFloat(GraphPass):
    """DOUBLE becomes FLOAT everywhere inside, as the parser would do it."""

    name = "double-to-float"

    def requires(self, model: ir.Model) -> str | None:
        """Something inside is DOUBLE; an input or output that is cannot be changed without its caller."""
        infer_types(model)
        ends = [value.name for value in (*model.graph.inputs, *model.graph.outputs) if dtype_of(value) == _DOUBLE]
        if ends:
            return f"{ends[0]} is an input or output of DOUBLE"
        values = [value for graph in model.graphs() for value in graph.initializers.values()]
        values += [value for node in model.graph.all_nodes() for value in node.outputs]
        return None if any(dtype_of(value) == _DOUBLE for value in values) else "no DOUBLE"

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Constants, casts and the types of values."""
        for graph in model.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None and value.const_value.dtype == _DOUBLE:
                    value.const_value = _single(value.const_value)
                _retype(value)
        for node in model.graph.all_nodes():
            for attribute in list(node.attributes.values()):
                if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _DOUBLE:
                    node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _single(attribute.as_tensor()))
                elif attribute.name in ("to", "dtype") and attribute.as_int() == _DOUBLE.value:
                    node.attributes[attribute.name] = ir.AttrInt64(attribute.name, _SINGLE.value)
            for value in node.outputs:
                _retype(value)
        return model, True


class Float32Islands(GraphPass):
    """Norms and softmax that compute in FP16 get casts to FP32 before and back behind."""

    name = "float32-islands"

    def requires(self, model: ir.Model) -> str | None:
        """One of them reads FP16."""
        infer_types(model)
        return None if any(_in_half(model)) else "no norm or softmax in FP16"

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """One island for each node; names of values stay with the FP16 ones."""
        for node in list(_in_half(model)):
            _make_island(node)
        return model, True

    def ensures(self, model: ir.Model) -> str | None:
        """None is left in FP16."""
        left = next(_in_half(model), None)
        return None if left is None else f"{left.name} still computes in FP16"


def _masks(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for one in constants_of(model):
        if one.tensor.dtype not in (_SINGLE, _HALF, _DOUBLE) or not role_of(one.value).masks:
            continue
        if bool((one.tensor.numpy() <= FP16_MASK).any()):
            yield one.value, one.tensor


def _in_half(model: ir.Model) -> Iterator[ir.Node]:
    for node in model.graph.all_nodes():
        if node.op_type in _ISLANDS and node.domain in STANDARD and dtype_of(node.inputs[0]) == _HALF:
            used = [value for value in node.outputs[1:] if value.name and value.uses()]
            if not used:
                yield node


def _make_island(node: ir.Node) -> None:
    graph = node.graph
    if graph is None:
        return
    output, casts, inputs = node.outputs[0], [], []
    stem = node.name or output.name
    for index, value in enumerate(node.inputs):
        if value is None or dtype_of(value) != _HALF:
            inputs.append(value)
            continue
        cast = ir.node("Cast", [value], {"to": _SINGLE.value}, name=f"{stem}/float32_{index}")
        _describe(cast.outputs[0], f"{stem}.input{index}.float32", _SINGLE, value.shape)
        casts.append(cast)
        inputs.append(cast.outputs[0])
    inner = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        num_outputs=1,
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    name = output.name
    _describe(inner.outputs[0], f"{name}.float32", _SINGLE, output.shape)
    back = ir.node("Cast", [inner.outputs[0]], {"to": _HALF.value}, name=f"{stem}/float16")
    graph.insert_before(node, [*casts, inner, back])
    ir.convenience.replace_all_uses_with(output, back.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    output.name = None
    _describe(back.outputs[0], name, _HALF, output.shape)


def _describe(value: ir.Value, name: str | None, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.name, value.type = name, ir.TensorType(dtype)
    value.shape = None if shape is None else ir.Shape(shape.dims)


def _store(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """`tensor` in the place of the constant `value`."""
    node = value.producer()
    if node is None:
        value.const_value = tensor
        return
    for attribute in list(node.attributes.values()):
        if attribute.type == ir.AttributeType.TENSOR:
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, tensor)
        elif attribute.name == "value_float":
            node.attributes[attribute.name] = ir.AttrFloat32(attribute.name, float(tensor.numpy().reshape(-1)[0]))
        elif attribute.name == "value_floats":
            node.attributes[attribute.name] = ir.AttrFloat32s(attribute.name, tensor.numpy().tolist())
    value.const_value = None


def _single(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _retype(value: ir.Value) -> None:
    if dtype_of(value) == _DOUBLE:
        value.type = ir.TensorType(_SINGLE)
