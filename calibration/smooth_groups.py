"""Which activations of a graph can be smoothed, and where the scale goes.

A group is one activation `X` `[..., C]` with all products that read it, `Y_i = X @ W_i`. For any positive `s` `[C]`,
`Y_i = (X / s) @ (diag(s) W_i)`: the rows of the weights take `s` up, and `1 / s` goes to one of three places.

- "norm": into weight and bias of the normalisation that makes `X`, when nothing but the products reads it. Any
  multiplication by a constant vector counts as one (the last step of an RMSNorm in primitive operators).
- "linear": into the columns and the bias of the product that makes `X`. Between the two may lie what commutes with a
  positive scale per channel: ReLU, the other factor of a gated MLP, attention (linear in the values, channel by
  channel). GELU and SiLU do not commute, which is why fc1 -> GELU -> fc2 is not such a pair.
- "mul": into an extra `Mul` in front of the products. This is all that is left where the residual reads `X` too
  (post-LN models such as the Q-Former), behind GELU, and for inputs of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from ..export.passes.match import constant_ints, only_consumer, permutation, producer
from .linears import find_linears

Kind = Literal["norm", "linear", "mul"]

# (domain, operator) of the normalisations over the last axis -> where their weight and bias are among the inputs.
_NORMS: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1,),
    ("", "SimplifiedLayerNormalization"): (1,),
    ("com.microsoft", "SimplifiedLayerNormalization"): (1,),
    ("com.microsoft", "SkipLayerNormalization"): (2, 3),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (2,),
}


@dataclass(frozen=True)
class ChannelWeight:
    """Input `index` of `node`, an initializer; `axis` is the one that runs over the group's channels."""

    node: ir.Node
    index: int
    axis: int = -1

    @property
    def value(self) -> ir.Value:
        """The initializer that is there now."""
        value = self.node.inputs[self.index]
        if value is None or value.const_value is None:
            raise ValueError(f"input {self.index} of {self.node.name} is no initializer")
        return value


@dataclass(frozen=True)
class SmoothGroup:
    """One activation and the products that share its scale.

    `products`: their weights, multiplied by `s` along the rows. `divided`: what takes `1 / s`; empty for kind "mul".
    `along`: the values between the producing linear and `X`, in graph order, the last axis of each over the `C`
    channels: they shrink by `s` as well. `by_head`: value -> the one of `along` (or `X`) that it is a re-arrangement
    of, `[B, heads, N, head_size]` in either order of its middle axes.
    """

    value: ir.Value
    kind: Kind
    width: int
    products: tuple[ChannelWeight, ...]
    divided: tuple[ChannelWeight, ...] = ()
    along: tuple[str, ...] = ()
    by_head: tuple[tuple[str, str], ...] = ()
    head_size: int = 0

    @property
    def name(self) -> str:
        """The name of the activation: the key of the group everywhere."""
        return self.value.name or ""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the products."""
        return tuple(weight.node.name or "" for weight in self.products)


def find_groups(model: ir.Model) -> tuple[SmoothGroup, ...]:
    """All groups of `model`, in the order of the graph.

    Products are MatMul and Gemm with a weight `[C, N]` that is an initializer; Conv is none of them.
    """
    nodes = {node.name: node for node in model.graph}
    readers: dict[ir.Value, list[ChannelWeight]] = {}
    for linear in find_linears(model):
        weight = _product(nodes[linear.node])
        value = nodes[linear.node].inputs[0]
        if weight is not None and value is not None:
            readers.setdefault(value, []).append(weight)
    return tuple(_group(value, tuple(products)) for value, products in readers.items())


def values_to_watch(model: ir.Model) -> tuple[str, ...]:
    """Names of the values whose statistics `smooth` needs, in the order of the graph."""
    names: dict[str, None] = {}
    for group in find_groups(model):
        names.update(dict.fromkeys((*group.along[-1:], group.name)))
    return tuple(names)


def _product(node: ir.Node) -> ChannelWeight | None:
    weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
    if weight is None or weight.shape is None or len(weight.shape) != 2 or node.attributes.get_int("transA"):
        return None
    return ChannelWeight(node, 1, 1 if node.attributes.get_int("transB") else 0)


def _group(value: ir.Value, products: tuple[ChannelWeight, ...]) -> SmoothGroup:
    width = _channels(products[0])
    if len(value.uses()) == len(products) and not value.is_graph_output():
        divided = _norm(value, width)
        if divided:
            return SmoothGroup(value, "norm", width, products, divided)
        path = _linear_path(value, width)
        if path is not None:
            return SmoothGroup(
                value,
                "linear",
                width,
                products,
                tuple(path.divided),
                tuple(path.along),
                tuple(path.by_head),
                path.head_size,
            )
    return SmoothGroup(value, "mul", width, products)


def _channels(weight: ChannelWeight) -> int:
    return int(weight.value.shape.numpy()[weight.axis])  # type: ignore[union-attr]  # has a shape: it is an initializer


def _vector(node: ir.Node, index: int, width: int) -> ChannelWeight | None:
    """The input when it is an initializer of `width` numbers along the last axis, all other axes 1."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None or not value.is_initializer() or value.shape is None:
        return None
    dims = tuple(value.shape)
    return ChannelWeight(node, index) if dims[-1:] == (width,) and set(dims[:-1]) <= {1} else None


def _norm(value: ir.Value, width: int) -> tuple[ChannelWeight, ...]:
    """Weight and bias of the normalisation whose first output `value` is; empty where there is none."""
    node = value.producer()
    if node is None or node.outputs[0] is not value:
        return ()
    if node.domain == "" and node.op_type == "Mul":
        found = [_vector(node, index, width) for index in (0, 1)]
        return tuple(vector for vector in found if vector is not None)[:1]
    places = _NORMS.get((node.domain, node.op_type), ())
    if places and node.attributes.get_int("axis", -1) not in (-1, _rank(value) - 1):
        return ()
    given = [index for index in places if index < len(node.inputs) and node.inputs[index] is not None]
    vectors = tuple(vector for index in given if (vector := _vector(node, index, width)) is not None)
    return vectors if len(vectors) == len(given) else ()


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else -1


@dataclass
class _Path:
    """What lies between a producing linear and `X`; see SmoothGroup."""

    along: list[str]
    by_head: list[tuple[str, str]]
    divided: list[ChannelWeight]
    head_size: int = 0


def _linear_path(value: ir.Value, width: int) -> _Path | None:
    """The way back from `value` to a product whose columns are its channels; None where there is none."""
    relu = producer(value, "Relu")
    if relu is not None:
        return _ending_in(relu.inputs[0], width)
    gate = producer(value, "Mul")
    if gate is not None:
        found = (_ending_in(side, width) for side in reversed(gate.inputs))
        return next((path for path in found if path is not None), None)
    return _attention(value, width) or _linear(value, width)


def _ending_in(value: ir.Value | None, width: int) -> _Path | None:
    """`_linear` of a value that only one node reads."""
    return _linear(value, width) if value is not None and only_consumer(value) is not None else None


def _linear(value: ir.Value, width: int) -> _Path | None:
    """`value` is `MatMul(x, W)` or that plus a bias."""
    divided, names = [], [value.name or ""]
    add = producer(value, "Add")
    if add is not None:
        biases = [vector for index in (0, 1) if (vector := _vector(add, index, width)) is not None]
        if len(biases) != 1:
            return None
        divided.append(biases[0])
        product = add.inputs[1 - biases[0].index]
        if product is None or only_consumer(product) is None:
            return None
        value = product
        names.insert(0, value.name or "")
    node = producer(value, "MatMul")
    weight = node.inputs[1] if node is not None else None
    if node is None or weight is None or weight.const_value is None or not weight.is_initializer():
        return None
    if weight.shape is None or tuple(weight.shape)[1:] != (width,):
        return None
    return _Path(names, [], [ChannelWeight(node, 1, 1), *divided])


def _attention(value: ir.Value, width: int) -> _Path | None:
    """`value` `[B, N, C]` is `Reshape(Transpose(probabilities @ values))`, values a projection split into heads."""
    merged = producer(value, "Reshape")
    context = _swapped(merged.inputs[0]) if merged is not None else None
    product = producer(context, "MatMul")
    split = _swapped(product.inputs[1]) if product is not None else None
    reshape = producer(split, "Reshape")
    if merged is None or product is None or reshape is None or product.inputs[1] is None or split is None:
        return None
    heads = constant_ints(reshape.inputs[1])
    if heads is None or len(heads) != 4 or min(heads[2:]) < 1 or heads[2] * heads[3] != width:
        return None
    between = [merged.inputs[0], context, product.inputs[1], split]
    if any(one is None or only_consumer(one) is None for one in between):
        return None
    path = _ending_in(reshape.inputs[0], width)
    if path is not None:
        path.head_size = heads[3]
        path.by_head += [(_name(merged.inputs[0]), _name(value)), (_name(context), _name(value))]
        path.by_head += [(_name(one), path.along[-1]) for one in (split, product.inputs[1])]
    return path


def _swapped(value: ir.Value | None) -> ir.Value | None:
    """What a Transpose of heads and tokens reads."""
    node = producer(value, "Transpose")
    return node.inputs[0] if node is not None and permutation(node) == (0, 2, 1, 3) else None


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""
