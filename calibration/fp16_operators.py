"""What each operator does to precision: which compute in FP32, which only move values, which multiply weights.

Operators of the standard and of ONNX Runtime's domain have different names, so a name says enough.
"""

from __future__ import annotations

import onnx_ir as ir

FLOAT16_MAX = 65504.0
# Half of the smallest subnormal: what is below it rounds to 0.
FLOAT16_FLUSHED = 2.0**-25

# Statistics over a row, and functions that are steep or whose argument is large: sums of squares pass 65504 long
# before the activations do, and an angle of 2000 has no fraction in FP16. Strongly typed engines compute a norm in the
# type of its input, whatever stash_type says.
ISLANDS = frozenset(
    {
        "LayerNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "RMSNormalization",
        "LpNormalization",
        "MeanVarianceNormalization",
        "SkipLayerNormalization",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "Softmax",
        "LogSoftmax",
        "ReduceMean",
        "ReduceSum",
        "ReduceL1",
        "ReduceL2",
        "ReduceSumSquare",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceProd",
        "CumSum",
        "Pow",
        "Sqrt",
        "Reciprocal",
        "Exp",
        "Log",
        "Sin",
        "Cos",
    }
)
# Not defined for FP16.
FLOAT32_ONLY = frozenset({"Range", "DynamicQuantizeLinear", "NonMaxSuppression"})

# Their results are copies of their inputs' values (or negations), so they round nothing.
EXACT = frozenset(
    {
        "Abs",
        "Concat",
        "ConstantOfShape",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "GlobalMaxPool",
        "Identity",
        "MaxPool",
        "Neg",
        "Pad",
        "ReduceMax",
        "ReduceMin",
        "Relu",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
# Where FP16 is worth its Casts: never drawn into an island because both neighbours are FP32.
PRODUCTS = frozenset(
    {
        "Attention",
        "Conv",
        "ConvTranspose",
        "Einsum",
        "Gemm",
        "GroupQueryAttention",
        "MatMul",
        "MatMulNBits",
        "MultiHeadAttention",
    }
)
# Steps from a statistic to the value that it normalises.
STATISTIC_STEPS = EXACT | {"Add", "Cast", "Clip", "Div", "Log", "Max", "Min", "Mul", "Pow", "Reciprocal", "Sqrt", "Sub"}

# Inputs whose type is not that of the data, by index.
_OWN_TYPE = {"Resize": frozenset({1, 2})}


def is_float(value: ir.Value | None) -> bool:
    """Whether the value is FP32."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def float_inputs(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """The FP32 inputs whose type follows the node's precision, with their index."""
    fixed = _OWN_TYPE.get(node.op_type, frozenset())
    return [
        (index, value)
        for index, value in enumerate(node.inputs)
        if value is not None and is_float(value) and index not in fixed
    ]


def activations(node: ir.Node) -> list[ir.Value]:
    """Those of `float_inputs` that are computed, not stored."""
    return [value for _, value in float_inputs(node) if not is_stored(value)]


def is_stored(value: ir.Value | None) -> bool:
    """Whether the value is an initializer, so that it can be stored in another type."""
    return value is not None and value.is_initializer() and value.const_value is not None


def has_float_output(node: ir.Node) -> bool:
    """Whether the node gives any FP32 value."""
    return any(is_float(value) for value in node.outputs)


def consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read it, in no order, each once."""
    return list(dict.fromkeys(node for node, _ in value.uses()))
