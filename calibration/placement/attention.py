"""Written-out attention, `Softmax(Q K^T * scale + mask) V`, and whether TensorRT has a fused kernel for it.

Conditions: TensorRT developer guide, "Multi-head attention fusion", as quoted in NVIDIA/TensorRT issues 2981 and
4167; for FP8 the release notes of 10.6. A kernel that exists may still be declined after timing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from .patterns import MOVES, data_inputs, is_standard

INT8_HEAD_SIZES = (16, 32, 64)
INT8_LONGEST = 512
FP8_LARGEST_HEAD = 64
FP8_LONGEST = 3072
_PLAIN = MOVES | {"Cast", "QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class Attention:
    """One attention: `scores`, the first batch matmul (Q, K^T), `softmax`, `mix`, the second (probabilities, V).

    `scalings`: Mul and Div by a constant between scores and softmax. `additions`: mask or bias Adds there.
    `guards`: nodes between softmax and `mix` that no fused kernel has.
    """

    scores: ir.Node
    softmax: ir.Node
    mix: ir.Node
    scalings: tuple[ir.Node, ...] = ()
    additions: tuple[ir.Node, ...] = ()
    guards: tuple[ir.Node, ...] = ()

    @property
    def head_size(self) -> int | None:
        """Last axis of Q; None when it is dynamic or unknown."""
        return _fixed(self.scores.inputs[0], -1)

    @property
    def lengths(self) -> tuple[int | None, int | None]:
        """Query and key length; None where dynamic or unknown."""
        return _fixed(self.scores.inputs[0], -2), _fixed(self.scores.inputs[1], -1)


@dataclass
class _Walk:
    scalings: list[ir.Node] = field(default_factory=list)
    additions: list[ir.Node] = field(default_factory=list)


def find_attentions(model: ir.Model) -> tuple[Attention, ...]:
    """Every attention of the graph, in its order."""
    found = (match_attention(node) for node in model.graph if is_standard(node, "Softmax"))
    return tuple(one for one in found if one is not None)


def match_attention(softmax: ir.Node) -> Attention | None:
    """The attention around a Softmax; None when it is none (a router, a pooling)."""
    walk = _Walk()
    scores = _scores_of(softmax.inputs[0], walk)
    guards: list[ir.Node] = []
    mix = _mix_of(softmax.outputs[0], guards)
    if scores is None or mix is None:
        return None
    return Attention(scores, softmax, mix, tuple(walk.scalings), tuple(walk.additions), tuple(guards))


def unfused_reason(attention: Attention, precision: str) -> str | None:
    """Why TensorRT has no fused kernel of `precision` ("int8", "fp8") for it; None when it may have one."""
    if attention.guards:
        return f"{attention.guards[0].op_type} stands between softmax and the second matmul"
    if any(len(set(node.uses())) > 1 or node.is_graph_output() for node in attention.softmax.outputs):
        return "its probabilities are read by something else too"
    size, (queries, keys) = attention.head_size, attention.lengths
    if size is None or queries is None or keys is None:
        return f"head size {_text(size)} or lengths {_text(queries)} and {_text(keys)} are not fixed in the graph"
    longest = max(queries, keys)
    if precision == "int8":
        if size not in INT8_HEAD_SIZES:
            return f"head size {size} has no fused INT8 kernel (16, 32 and 64 have)"
        limit = INT8_LONGEST
    else:
        if size > FP8_LARGEST_HEAD or size < 16 or size % 8:
            return f"head size {size} has no fused FP8 kernel (16 to 64 in steps of 8 have)"
        limit = FP8_LONGEST
    if longest > limit:
        return f"sequence length {longest} is beyond the fused {precision.upper()} kernels' {limit}"
    return None


def _scores_of(value: ir.Value | None, walk: _Walk) -> ir.Node | None:
    """Back from the softmax to the matmul of two computed values."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if is_standard(node, "MatMul"):
        return node if len(data_inputs(node)) == 2 else None
    if is_standard(node, *_PLAIN):
        return _scores_of(node.inputs[0], walk)
    if is_standard(node, "Mul", "Div") and len(data_inputs(node)) == 1:
        walk.scalings.append(node)
        return _scores_of(data_inputs(node)[0], walk)
    if is_standard(node, "Add", "Where"):
        walk.additions.append(node)
        found = (_scores_of(one, walk) for one in data_inputs(node))
        return next((one for one in found if one is not None), None)
    return None


def _mix_of(value: ir.Value, guards: list[ir.Node]) -> ir.Node | None:
    """Forward from the softmax to the matmul that reads it on its left."""
    for node, index in value.uses():
        if is_standard(node, "MatMul") and index == 0 and len(data_inputs(node)) == 2:
            return node
        if is_standard(node, *_PLAIN) and (mix := _mix_of(node.outputs[0], guards)) is not None:
            return mix
        if is_standard(node, "Where", "Mul") and (mix := _mix_of(node.outputs[0], guards)) is not None:
            guards.append(node)
            return mix
    return None


def _fixed(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None or len(value.shape) < 2:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def _text(size: int | None) -> str:
    return "?" if size is None else str(size)
