"""Self-attention as ONNX Runtime's `QAttention`: projections in INT8, scores and mixing in float, no transposes.

Its kernel writes Q, K and V where the batch matmuls read them, so four transposes fall away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...export.passes.match import constant_ints, only_consumer, permutation, producer
from ...export.passes.weights import constant, derived_initializer
from .attention import Attention, find_attentions
from .base import drop_unused
from .cpu_parts import CONTRIBUTED, LinearPart, Quantized, WeightFormat, linear_part, replace_nodes
from .plan import scaling_factor

_QUERY_PERM, _KEY_PERM = (0, 2, 1, 3), (0, 2, 3, 1)


@dataclass(frozen=True)
class Projection:
    """`part`, then Reshape to `[B, S, heads, head_size]` and Transpose."""

    part: LinearPart
    reshape: ir.Node
    transpose: ir.Node
    heads: int
    head_size: int


@dataclass(frozen=True)
class SelfAttention:
    """Attention whose Q, K and V are products of one tensor, without a mask."""

    query: Projection
    key: Projection
    value: Projection
    attention: Attention
    scale: float
    end: tuple[ir.Node, ir.Node]  # Transpose and Reshape back to [B, S, N]

    @property
    def softmax(self) -> ir.Node:
        """Of the scores."""
        return self.attention.softmax

    @property
    def names(self) -> frozenset[str]:
        """The three products, and both batch matmuls."""
        nodes = [one.part.node for one in (self.query, self.key, self.value)]
        nodes += [self.attention.scores, self.attention.mix]
        return frozenset(node.name or "" for node in nodes)


def find_self_attentions(model: ir.Model) -> tuple[SelfAttention, ...]:
    """Every one that the fused operator computes as it is."""
    found = (_match(one) for one in find_attentions(model))
    return tuple(one for one in found if one is not None)


def _match(one: Attention) -> SelfAttention | None:
    if one.additions or one.guards or one.softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    scale = 1.0
    for node in one.scalings:
        factor = scaling_factor(node) if node.inputs[1] is not None else None
        if factor is None:
            return None
        scale *= factor
    parts = [
        _projection(one.scores.inputs[0], _QUERY_PERM),
        _projection(one.scores.inputs[1], _KEY_PERM),
        _projection(one.mix.inputs[1], _QUERY_PERM),
    ]
    end = _end_of(one)
    # Straight from scores to mix: everything between is removed.
    inner = [one.scores, *reversed(one.scalings), one.softmax]
    straight = all(only_consumer(node.outputs[0]) is not None for node in inner)
    if end is None or not straight or any(part is None for part in parts):
        return None
    query, key, value = (part for part in parts if part is not None)
    same = {(part.part.x, part.heads, part.head_size) for part in (query, key, value)}
    x = query.part.x
    if len(same) != 1 or x.shape is None or len(x.shape) != 3:
        return None
    return SelfAttention(query, key, value, one, scale, end)


def _projection(value: ir.Value | None, perm: tuple[int, ...]) -> Projection | None:
    transpose = producer(value, "Transpose")
    if transpose is None or permutation(transpose) != perm or only_consumer(transpose.outputs[0]) is None:
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    if reshape is None or only_consumer(reshape.outputs[0]) is None:
        return None
    shape, output = constant_ints(reshape.inputs[1]), reshape.outputs[0].shape
    if shape is not None and len(shape) == 4:
        heads, size = shape[2:]
    elif output is not None and len(output) == 4 and isinstance(output[2], int) and isinstance(output[3], int):
        heads, size = output[2], output[3]
    else:
        return None
    maker = None if reshape.inputs[0] is None else reshape.inputs[0].producer()
    found = _linear_behind(maker)
    if found is None or only_consumer(found.output) is None or heads < 1 or size < 1:
        return None
    if found.weight.shape is None or found.weight.shape.numpy()[1] != heads * size:
        return None
    return Projection(found, reshape, transpose, heads, size)


def _linear_behind(node: ir.Node | None) -> LinearPart | None:
    """The product whose last node is `node`: the Add of its bias, or the MatMul itself."""
    if node is None:
        return None
    for candidate in (node, *(None if value is None else value.producer() for value in node.inputs)):
        part = linear_part(candidate)
        if part is not None and part.nodes[-1] is node:
            return part
    return None


def _end_of(one: Attention) -> tuple[ir.Node, ir.Node] | None:
    transpose = only_consumer(one.mix.outputs[0])
    if transpose is None or transpose.op_type != "Transpose" or permutation(transpose) != _QUERY_PERM:
        return None
    reshape = only_consumer(transpose.outputs[0])
    if reshape is None or reshape.op_type != "Reshape":
        return None
    shape = reshape.outputs[0].shape
    return (transpose, reshape) if shape is not None and len(shape) == 3 else None


def fuse_attention(model: ir.Model, one: SelfAttention, activations: Quantized, weights: WeightFormat) -> None:
    """Replace it. The weights of Q, K and V are stored side by side, `[K, 3 N]`, with a scale for each column."""
    parts = [one.query.part, one.key.part, one.value.part]
    quantized, scale, zero = activations(model, parts[0].x)
    stored, weight_scale, bias = _joined(model, parts, weights)
    columns = 3 * one.query.heads * one.query.head_size
    weight_zero = constant(model, f"zero_point.int8.{columns}", np.zeros(columns, np.int8))
    node = ir.node(
        "QAttention",
        [quantized, stored, bias, scale, weight_scale, None, zero, weight_zero],
        {"num_heads": one.query.heads, "scale": one.scale},
        domain=CONTRIBUTED,
        name=f"{one.softmax.name}/QAttention",
    )
    replace_nodes(model, one.end, one.end[1].outputs[0], [node], scope=one.softmax)
    middle = [one.attention.mix, one.softmax, *one.attention.scalings, one.attention.scores]
    for projection in (one.query, one.key, one.value):
        middle += [projection.transpose, projection.reshape, *reversed(projection.part.nodes)]
    for gone in middle:
        model.graph.remove(gone, safe=True)
    for part in parts:
        drop_unused(model, part.weight)


def _joined(model: ir.Model, parts: list[LinearPart], weights: WeightFormat) -> tuple[ir.Value, ir.Value, ir.Value]:
    name = f"{parts[0].weight.name}.qkv"
    rows, columns = parts[0].weights().shape
    scales = np.concatenate([weights.scales(part.weights()) for part in parts])
    sources = [part.weight.const_value for part in parts if part.weight.const_value is not None]

    def compute(_: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> np.ndarray[tuple[int, ...], np.dtype[np.int8]]:
        together = np.concatenate([source.numpy() for source in sources], axis=1)
        return weights.quantize(together, scales)

    stored = derived_initializer(model, f"{name}.int8", sources[0], compute, [rows, 3 * columns], ir.DataType.INT8)
    biases = [
        np.zeros(columns, np.float32) if part.bias is None or part.bias.const_value is None
        else np.asarray(part.bias.const_value.numpy(), np.float32)
        for part in parts
    ]  # fmt: skip
    return (
        stored,
        constant(model, f"{name}.int8.scale", scales),
        constant(model, f"{name}.bias", np.concatenate(biases)),
    )
