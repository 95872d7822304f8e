"""The rules of explicit quantisation in TensorRT, checked on any ONNX graph, whoever wrote it.

The checker reads the graph only: it knows nothing of how Q/DQ was placed, needs no GPU and no TensorRT, and reads no
weight. "error": TensorRT refuses the graph, or it computes something else or much worse than meant. "warning": it
builds, and is slower, larger or less accurate than it could be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from ..errors import InputError
from . import rules_numbers as numbers
from . import rules_places as places
from .rules_graph import Finding, QdqGraph

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Rule:
    """One rule. `wants`: what holds in a good graph; `why`: what happens otherwise; `fix`: what to do."""

    name: str
    severity: Severity
    wants: str
    why: str
    fix: str
    find: Callable[[QdqGraph], Iterator[Finding]]


@dataclass(frozen=True)
class RuleViolation:
    """A rule that does not hold at `node`. `why`: what was found there, and what it leads to."""

    rule: str
    severity: Severity
    node: str
    why: str
    fix: str

    def as_text(self) -> str:
        """One line."""
        return f"{self.severity} {self.rule} at {self.node}: {self.why}; {self.fix}"


RULES: tuple[Rule, ...] = (
    Rule(
        "contributed-operator",
        "error",
        "only operators of ai.onnx that TensorRT's parser imports",
        "the parser has no importer for it",
        "quantise with QuantizeLinear and DequantizeLinear, and export without contributed operators",
        places.contributed_operator,
    ),
    Rule(
        "opset",
        "error",
        "an opset in which the types and attributes of Q/DQ exist",
        "the parser reads the node by an older definition",
        "export with that opset",
        numbers.opset_low,
    ),
    Rule(
        "quantized-type",
        "error",
        "INT8, FP8 E4M3, INT4 or FP4",
        "TensorRT has no such type for GPUs",
        "quantise to INT8 with zero point 0",
        numbers.unsigned_type,
    ),
    Rule(
        "other-precision",
        "error",
        "no quantised type besides that of the stated precision",
        "the graph is not what its name says",
        "state the precision that it has, or place Q/DQ again",
        numbers.other_precision,
    ),
    Rule(
        "zero-point-missing",
        "warning",
        "a zero point as third input",
        "without one QuantizeLinear gives UINT8, and older parsers want three inputs",
        "add a zero point of 0",
        numbers.zero_point_missing,
    ),
    Rule(
        "zero-point-constant",
        "error",
        "a zero point known at build time",
        "dynamic quantisation is not imported",
        "calibrate, and write the zero point as an initializer",
        numbers.zero_point_constant,
    ),
    Rule(
        "zero-point",
        "error",
        "zero point 0",
        "TensorRT quantises symmetrically only",
        "quantise symmetrically (ActivationSymmetric, WeightSymmetric)",
        numbers.zero_point_nonzero,
    ),
    Rule(
        "scale-constant",
        "error",
        "a scale known at build time",
        "dynamic quantisation is not imported",
        "calibrate, and write the scale as an initializer",
        numbers.scale_constant,
    ),
    Rule(
        "scale-positive",
        "error",
        "finite scales above 0",
        "the parser refuses other scales",
        "leave a tensor that is always 0 in float",
        numbers.scale_positive,
    ),
    Rule(
        "scale-type",
        "error",
        "a scale of the type of the tensor that it quantises",
        "a strongly typed network does not convert it",
        "cast the scale to that type",
        numbers.scale_type,
    ),
    Rule(
        "activation-per-tensor",
        "error",
        "one scale for an activation",
        "TensorRT has scales per channel for weights only",
        "give the activation one scale",
        numbers.activation_per_tensor,
    ),
    Rule(
        "weight-axis",
        "error",
        "a scale for each output channel of a weight: axis 1 of MatMul's [K, N], axis 0 of Conv's",
        "scales along the summed axis cannot be applied to the sum",
        "write the scales along the output channels",
        numbers.weight_axis_wrong,
    ),
    Rule(
        "weight-per-channel",
        "warning",
        "INT8 weights with a scale for each output channel",
        "the largest channel takes the resolution of all others",
        "quantise weights per channel (per_channel=True)",
        numbers.weight_per_tensor,
    ),
    Rule(
        "weight-stored-float",
        "warning",
        "weights stored quantised, with a DequantizeLinear only",
        "the file is as large as before",
        "store the quantised numbers (AddQDQPairToWeight=False)",
        numbers.weight_stored_float,
    ),
    Rule(
        "bias-int32",
        "error",
        "biases in float",
        "the parser refuses INT32 for DequantizeLinear",
        "leave biases in float (QuantizeBias=False)",
        numbers.bias_int32,
    ),
    Rule(
        "activation-int4",
        "error",
        "INT4 for weights only",
        "TensorRT has no INT4 activations",
        "quantise activations to INT8 or not at all",
        numbers.four_bit_activation,
    ),
    Rule(
        "block",
        "error",
        "blocks of INT4, FP8 or FP4 along the last or second-last axis, with a scale for each",
        "TensorRT has no such blocks",
        "quantise in blocks along the summed axis of a two-dimensional weight",
        numbers.block_wrong,
    ),
    Rule(
        "scalar",
        "error",
        "Q/DQ on tensors with at least one axis",
        "a scalar cannot be quantised",
        "leave scalars in float",
        numbers.scalar_input,
    ),
    Rule(
        "fp8-saturate",
        "warning",
        "saturating FP8",
        "TensorRT clips, so the engine differs from the graph",
        "write saturate=1",
        numbers.fp8_not_saturating,
    ),
    Rule(
        "unpaired",
        "error",
        "QuantizeLinear and DequantizeLinear in pairs",
        "a quantised tensor has no meaning for other operators",
        "add the other half",
        places.unpaired,
    ),
    Rule(
        "pair-scale",
        "error",
        "one scale for both halves of a pair",
        "the pair multiplies the tensor by the ratio of its scales",
        "use one scale",
        places.scales_differ,
    ),
    Rule(
        "quantized-norm",
        "error",
        "normalisations that read float",
        "a rounded input or parameter costs accuracy and gains nothing",
        "take the pair off (op_types_to_quantize without it)",
        places.quantized_norm,
    ),
    Rule(
        "quantized-softmax",
        "error",
        "a softmax that reads float",
        "rounded scores cost accuracy, and attention no longer fuses",
        "take the pair off (op_types_to_quantize without it)",
        places.quantized_softmax,
    ),
    Rule(
        "quantized-mask-add",
        "error",
        "scores and masks in float",
        "the mask's size takes the scores' resolution, and attention no longer fuses",
        "leave the Add out (nodes_to_exclude)",
        places.quantized_mask_add,
    ),
    Rule(
        "quantized-activation",
        "error",
        "activation functions that read float",
        "a rounded input costs accuracy, and the product before no longer fuses with it",
        "take the pair off (op_types_to_quantize without it)",
        places.quantized_activation,
    ),
    Rule(
        "needless-pair",
        "warning",
        "pairs on inputs of products and skip connections only",
        "rounding costs accuracy and time there, and can stop a fusion",
        "take the pair off",
        places.needless_pair,
    ),
    Rule(
        "half-quantized",
        "error",
        "Q/DQ on both inputs of a product, or on none",
        "the product runs in float, with the rounding of the quantised input",
        "quantise the other input too, or neither",
        places.half_quantized,
    ),
    Rule(
        "attention-half",
        "error",
        "Q/DQ on Q, K, probabilities, V and result of an attention, or on none",
        "no fused kernel matches, and the matmuls run apart",
        "exclude the attention's matmuls, or quantise all five",
        places.attention_half,
    ),
    Rule(
        "attention-size",
        "error",
        "quantised attention for sizes that have a fused kernel only",
        "no fused kernel exists, and the matmuls run apart",
        "exclude the attention's matmuls",
        places.attention_unfused,
    ),
    Rule(
        "attention-fp8-order",
        "warning",
        "FP8 attention with scale and transposition before the pairs of Q and K",
        "DequantizeLinear does not feed the matmul as the fused kernel wants",
        "scale Q before its QuantizeLinear, transpose K before its own",
        places.attention_fp8_order,
    ),
    Rule(
        "float16-norm",
        "error",
        "normalisations in FP32 within an FP16 graph",
        "a strongly typed network computes it as written, and sums of squares overflow or lose their digits",
        "cast to FP32 before and back behind",
        places.float16_norm,
    ),
    Rule(
        "float16-softmax",
        "warning",
        "a softmax in FP32 within an FP16 graph",
        "a strongly typed network computes it as written",
        "cast to FP32 before and back behind",
        places.float16_softmax,
    ),
)


def check_rules(model: ir.Model | Path, *, precision: str, weight_only: bool = False) -> tuple[RuleViolation, ...]:
    """Every place where `model` breaks a rule, in the order of `RULES` and of the graph; empty for a good graph.

    `model`: a graph, or the path of one (external data and more than 2 GB are fine: weights are not read).
    `precision`: what the graph is meant to be ("fp32", "fp16", "int8", "fp8", "int4"). `weight_only`: activations are
    meant to stay in float. Shapes and types that the graph does not state are inferred and stored in it. Raises
    InputError for another precision or a file that is no ONNX model.
    """
    if precision not in numbers.PRECISIONS:
        raise InputError(f"precision {precision} has no rules; {list(numbers.PRECISIONS)} are accepted")
    if isinstance(model, Path):
        model = _load(model)
    graph = QdqGraph.of(model, precision, weight_only=weight_only)
    return tuple(
        RuleViolation(rule.name, rule.severity, found.node, f"{found.what}, and {rule.why}", rule.fix)
        for rule in RULES
        for found in rule.find(graph)
    )


def _load(path: Path) -> ir.Model:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return ir.load(path)
    except (OSError, DecodeError) as error:
        raise InputError(f"{path} is not read as an ONNX model ({error}); give the path of an .onnx file") from error
