"""What the rules of explicit quantisation look at: each QuantizeLinear and DequantizeLinear of a graph, read once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .placement.attention import Attention, find_attentions
from .placement.patterns import DEQUANTIZE, QUANTIZE, infer_types, is_constant, is_standard, origin, skip_input

# The constant that a Q/DQ reads may be cast first (3.1: Constant -> Cast -> Q).
_CONSTANT_MOVES = ("Cast", "Identity")


@dataclass(frozen=True)
class Finding:
    """A place where a rule does not hold, and what is there."""

    node: str
    what: str


@dataclass(frozen=True)
class Quantizer:
    """A QuantizeLinear or DequantizeLinear with its constants; None where they are not constant or absent."""

    node: ir.Node
    scale: NDArray[Any] | None
    zero_point: NDArray[Any] | None

    @property
    def name(self) -> str:
        """The node's name, else that of its output."""
        return name_of(self.node)

    @property
    def is_quantize(self) -> bool:
        """QuantizeLinear, not DequantizeLinear."""
        return self.node.op_type == QUANTIZE

    @property
    def block_size(self) -> int:
        """0 when the scales are not blocked."""
        return int(self.node.attributes.get_int("block_size", 0) or 0)

    @property
    def axis(self) -> int:
        """As written; the default is 1."""
        return int(self.node.attributes.get_int("axis", 1) or 0)

    @property
    def data(self) -> ir.Value | None:
        """What is (de)quantised."""
        return self.node.inputs[0]

    @property
    def dtype(self) -> ir.DataType | None:
        """The quantised type: that of the data for DequantizeLinear, of the zero point or result for QuantizeLinear."""
        if not self.is_quantize:
            return dtype_of(self.data)
        if len(self.node.inputs) > 2 and (zero := self.node.inputs[2]) is not None:
            return dtype_of(zero)
        written = self.node.attributes.get_int("output_dtype", 0)
        return ir.DataType(written) if written else ir.DataType.UINT8

    @property
    def is_weight(self) -> bool:
        """Whether the data is a constant, stored quantised or quantised on the way."""
        return is_constant(origin(self.data))


@dataclass(frozen=True)
class QdqGraph:
    """A model and what of it the rules ask about."""

    model: ir.Model
    precision: str
    weight_only: bool = False

    @classmethod
    def of(cls, model: ir.Model, precision: str, *, weight_only: bool) -> QdqGraph:
        """Types and shapes that the file does not state are inferred first."""
        infer_types(model)
        return cls(model, precision, weight_only)

    @cached_property
    def quantizers(self) -> tuple[Quantizer, ...]:
        """All of them, in the order of the graph."""
        return tuple(_read(node) for node in self.model.graph if is_standard(node, QUANTIZE, DEQUANTIZE))

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """Every written-out attention."""
        return find_attentions(self.model)

    @cached_property
    def attention_products(self) -> frozenset[ir.Node]:
        """Their batch matmuls."""
        return frozenset(node for one in self.attentions for node in (one.scores, one.mix))

    @cached_property
    def mask_adds(self) -> frozenset[ir.Node]:
        """Adds (and Where) between scores and softmax."""
        return frozenset(node for one in self.attentions for node in one.additions)

    @cached_property
    def opset(self) -> int:
        """Version of the standard operators."""
        return self.model.graph.opset_imports.get("", 0)

    def is_residual(self, node: ir.Node) -> bool:
        """Whether `node` adds a skip connection."""
        return skip_input(node) is not None

    def nodes(self, *op_types: str) -> Iterator[ir.Node]:
        """Standard nodes of these types."""
        return (node for node in self.model.graph if is_standard(node, *op_types))


def name_of(node: ir.Node) -> str:
    """The node's name, else what it computes."""
    return node.name or node.outputs[0].name or node.op_type


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """The element type; None when unknown."""
    if value is None:
        return None
    if value.dtype is None and value.const_value is not None:
        return value.const_value.dtype
    return value.dtype


def rank_of(value: ir.Value | None) -> int | None:
    """How many axes; None when unknown."""
    return None if value is None or value.shape is None else len(value.shape)


def is_quantized(value: ir.Value | None) -> bool:
    """Whether the numbers come out of a DequantizeLinear, moved or cast after it or not."""
    while value is not None and (node := value.producer()) is not None:
        if is_standard(node, DEQUANTIZE):
            return True
        if not is_standard(node, "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast"):
            return False
        value = node.inputs[0]
    return False


def constant_numbers(value: ir.Value | None) -> NDArray[Any] | None:
    """The numbers of a build-time constant, casts of a constant included; None otherwise."""
    while value is not None:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return np.asarray(tensor.numpy())
        node = value.producer()
        if not is_standard(node, *_CONSTANT_MOVES) or node is None:
            return None
        value = node.inputs[0]
    return None


def _read(node: ir.Node) -> Quantizer:
    zero = constant_numbers(node.inputs[2]) if len(node.inputs) > 2 else None
    return Quantizer(node, constant_numbers(node.inputs[1]), zero)
