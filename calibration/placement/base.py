"""Scales, quantised weights and Q/DQ pairs: what placements for different targets are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...errors import InputError
from ...export.passes.modules import SCOPES
from ...export.passes.weights import constant
from .fp8 import FP8_MAX, round_to_fp8

FloatArray = NDArray[np.float32]
_SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)
# For a channel of zeros, where any positive number does.
_ZERO_CHANNEL_SCALE = float(np.finfo(np.float16).smallest_normal)


@dataclass(frozen=True)
class QuantFormat:
    """A symmetric number format: the magnitude `largest` stands for the range's end."""

    name: str
    dtype: ir.DataType
    largest: float

    def quantize(self, array: NDArray[Any], scale: FloatArray) -> NDArray[Any]:
        """`array / scale` in this format, ties to even, clipped; `scale` broadcasts against `array`."""
        scaled = np.divide(array, scale, dtype=np.float32)
        if self.dtype == ir.DataType.INT8:
            rounded: NDArray[np.int8] = np.clip(np.rint(scaled, out=scaled), -128, 127, out=scaled).astype(np.int8)
            return rounded
        return round_to_fp8(scaled)

    def zero(self) -> NDArray[Any]:
        """The zero point, a scalar."""
        return np.zeros((), self.dtype.numpy())


INT8 = QuantFormat("int8", ir.DataType.INT8, 127.0)
FP8 = QuantFormat("fp8", ir.DataType.FLOAT8E4M3FN, FP8_MAX)
FORMATS = {"int8": INT8, "fp8": FP8}


def scales_from(absmax: FloatArray | float, quantization: QuantFormat) -> FloatArray:
    """Scales with which `absmax` just fits: positive, and exact in FP16 (rounded up), so that a later conversion of
    the graph to FP16 does not move the grid under weights that were rounded to it.

    Raises InputError for a magnitude that is not finite or whose scale FP16 cannot hold.
    """
    wanted = np.asarray(absmax, np.float32) / np.float32(quantization.largest)
    if not np.all(np.isfinite(wanted)) or float(wanted.max(initial=0.0)) > float(np.finfo(np.float16).max):
        raise InputError(
            f"a tensor to quantise has the magnitude {float(np.max(absmax)):g}; finite numbers below "
            f"{65504 * quantization.largest:.3g} are accepted, look for NaN or overflow in the checkpoint"
        )
    half = wanted.astype(np.float16)
    half = np.where(half.astype(np.float32) < wanted, np.nextafter(half, np.float16(math.inf)), half)
    scales = np.maximum(half.astype(np.float32), np.float32(_SMALLEST_SCALE))
    return np.asarray(np.where(wanted == 0, np.float32(_ZERO_CHANNEL_SCALE), scales), np.float32)


def channel_absmax(array: NDArray[Any], axis: int) -> FloatArray:
    """Largest magnitude of each slice along `axis`, `[C]`; no copy of the weight is made."""
    others = tuple(one for one in range(array.ndim) if one != axis)
    absmax: FloatArray = np.maximum(array.max(axis=others), -array.min(axis=others)).astype(np.float32)
    return absmax


def add_pair(model: ir.Model, value: ir.Value, scale: FloatArray, quantization: QuantFormat) -> ir.Value:
    """QuantizeLinear and DequantizeLinear on `value`, per tensor; the dequantised value, which nobody reads yet."""
    zero = constant(model, f"zero_point.{quantization.name}", quantization.zero())
    step = constant(model, f"{value.name}.scale", scale)
    q = ir.node("QuantizeLinear", [value, step, zero], name=f"{value.name}/QuantizeLinear")
    q.outputs[0].name, q.outputs[0].shape = f"{value.name}.quantized", value.shape
    q.outputs[0].type = ir.TensorType(quantization.dtype)
    dq = ir.node("DequantizeLinear", [q.outputs[0], step, zero], name=f"{value.name}/DequantizeLinear")
    dq.outputs[0].name, dq.outputs[0].shape = f"{value.name}.dequantized", value.shape
    dq.outputs[0].type = value.type
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], [q, dq])
    else:
        _copy_scope(producer, (q, dq))
        model.graph.insert_after(producer, [q, dq])
    return dq.outputs[0]


def add_weight(
    model: ir.Model, reader: ir.Node, weight: ir.Value, axis: int | None, quantization: QuantFormat
) -> ir.Value:
    """`weight` stored in the format, with a DequantizeLinear before `reader`; per channel along `axis`, per tensor
    for None. The dequantised value; a weight that was stored on the same axis before is used again.

    The numbers are computed from the source each time that they are asked for, so that a stage is never in memory
    twice; only the scales are computed now.
    """
    source = weight.const_value
    if source is None:
        raise InputError(f"{weight.name} is no weight of the graph; only initializers can be stored quantised")
    suffix = f"{quantization.name}.axis{axis}" if axis is not None else quantization.name
    known = model.graph.initializers.get(f"{weight.name}.{suffix}")
    if known is not None:
        return next(iter(known.uses()))[0].outputs[0]
    step, zero, stored = _store(model, weight, source, axis, quantization, suffix)
    attributes = {} if axis is None else {"axis": axis}
    dq = ir.node("DequantizeLinear", [stored, step, zero], attributes, name=f"{weight.name}/DequantizeLinear.{suffix}")
    dq.outputs[0].name, dq.outputs[0].shape = f"{weight.name}.{suffix}.dequantized", weight.shape
    dq.outputs[0].type = weight.type
    _copy_scope(reader, (dq,))
    model.graph.insert_before(reader, [dq])
    return dq.outputs[0]


def _store(
    model: ir.Model,
    weight: ir.Value,
    source: ir.TensorProtocol,
    axis: int | None,
    quantization: QuantFormat,
    suffix: str,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Scale, zero point and quantised numbers of a weight as initializers."""
    array = source.numpy()
    if axis is None:
        scales = broadcast = scales_from(max(float(array.max()), -float(array.min())), quantization)
        zeros = quantization.zero()
    else:
        scales = scales_from(channel_absmax(array, axis), quantization)
        broadcast = scales.reshape([-1 if one == axis else 1 for one in range(array.ndim)])
        zeros = np.zeros(scales.shape, quantization.dtype.numpy())
    del array
    name = f"{weight.name}.{suffix}"

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(quantization.quantize(source.numpy(), broadcast), dtype=quantization.dtype, name=name)

    lazy = ir.LazyTensor(evaluate, dtype=quantization.dtype, shape=ir.Shape(source.shape.numpy()), name=name)
    stored = ir.Value(
        name=name, type=ir.TensorType(quantization.dtype), shape=ir.Shape(source.shape.numpy()), const_value=lazy
    )
    model.graph.register_initializer(stored)
    return constant(model, f"{name}.scale", scales), constant(model, f"{name}.zero_point", zeros), stored


def drop_unused(model: ir.Model, weight: ir.Value) -> None:
    """Remove an initializer that nothing reads any more."""
    name = weight.name or ""
    if not weight.uses() and not weight.is_graph_output() and name in model.graph.initializers:
        del model.graph.initializers[name]


def _copy_scope(source: ir.Node, nodes: tuple[ir.Node, ...]) -> None:
    if SCOPES in source.metadata_props:
        for node in nodes:
            node.metadata_props[SCOPES] = source.metadata_props[SCOPES]
