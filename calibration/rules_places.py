"""Rules about where Q/DQ stands: pairs, products, attention, and what must stay in float.

Source: TensorRT developer guide, "Q/DQ layer-placement recommendations" and "Multi-head attention fusion"; NVIDIA's
answers in NVIDIA/TensorRT issues 3243 and 4167.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from .placement.attention import Attention, unfused_reason
from .placement.patterns import DEQUANTIZE, MOVES, PRODUCTS, QUANTIZE, is_constant, is_standard, origin, readers
from .rules_graph import Finding, QdqGraph, Quantizer, dtype_of, is_quantized, name_of

_NORMS = (
    "LayerNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
)
_ACTIVATIONS = ("Gelu", "Erf", "Tanh", "Sigmoid", "Softmax", "LogSoftmax", "HardSwish", "Swish", "Mish")
# Of a norm that is written out.
_STATISTICS = ("ReduceMean",)
# The parser has no importer for these (its operators.md), whatever domain they are in.
_UNSUPPORTED = (
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "QLinearMatMul",
    "QLinearConv",
)
_MOVING = MOVES | {"Cast", "Concat", "Slice", "Split", "Gather", "Expand", "Pad"}


def contributed_operator(graph: QdqGraph) -> Iterator[Finding]:
    """Standard operators only, and none of those that quantise at run time."""
    for node in graph.model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx"):
            yield Finding(name_of(node), f"{node.domain}.{node.op_type}")
        elif node.op_type in _UNSUPPORTED:
            yield Finding(name_of(node), node.op_type)


def unpaired(graph: QdqGraph) -> Iterator[Finding]:
    """A QuantizeLinear's result is read by DequantizeLinear only, which reads nothing but that or a constant."""
    for one in graph.quantizers:
        if one.is_quantize:
            yield from _unpaired_quantize(one)
        elif not is_constant(one.data):
            source = one.data.producer() if one.data is not None else None
            while is_standard(source, *MOVES) and source is not None and source.inputs[0] is not None:
                source = source.inputs[0].producer()
            if not is_standard(source, QUANTIZE) and not one.is_weight:
                given = "an input of the graph" if source is None else source.op_type
                yield Finding(one.name, f"it dequantises the result of {given}")


def scales_differ(graph: QdqGraph) -> Iterator[Finding]:
    """Both halves of a pair have the same scale."""
    by_node = {one.node: one for one in graph.quantizers}
    for one in graph.quantizers:
        if not one.is_quantize or one.scale is None:
            continue
        for node, _ in readers(one.node.outputs[0], through=MOVES):
            other = by_node.get(node)
            if other is None or other.scale is None:
                continue
            if other.scale.shape != one.scale.shape or bool((other.scale != one.scale).any()):
                yield Finding(one.name, f"its scale is not that of {other.name}")
                break


def quantized_norm(graph: QdqGraph) -> Iterator[Finding]:
    """Normalisations read float."""
    for node in graph.nodes(*_NORMS, *_STATISTICS):
        if is_quantized(node.inputs[0]):
            yield Finding(name_of(node), f"{node.op_type} reads a dequantised tensor")
        elif node.op_type in _NORMS and any(is_quantized(value) for value in node.inputs[1:]):
            yield Finding(name_of(node), f"{node.op_type} has quantised parameters")


def quantized_softmax(graph: QdqGraph) -> Iterator[Finding]:
    """Softmax reads float."""
    for node in graph.nodes("Softmax", "LogSoftmax"):
        if is_quantized(node.inputs[0]):
            yield Finding(name_of(node), "Softmax reads dequantised scores")


def quantized_mask_add(graph: QdqGraph) -> Iterator[Finding]:
    """The Add of a mask to the scores reads float: a mask of -1e4 leaves nothing of the scores' scale."""
    for node in graph.model.graph:
        if node in graph.mask_adds and any(is_quantized(value) for value in node.inputs):
            yield Finding(name_of(node), "scores or mask are quantised before the softmax")


def quantized_activation(graph: QdqGraph) -> Iterator[Finding]:
    """GELU and other activations read float, written out or as one operator."""
    for node in graph.nodes(*_ACTIVATIONS):
        if not is_standard(node, "Softmax", "LogSoftmax") and is_quantized(node.inputs[0]):
            yield Finding(name_of(node), f"{node.op_type} reads a dequantised tensor")


def needless_pair(graph: QdqGraph) -> Iterator[Finding]:
    """A pair serves a product or a residual Add; anything else reads float."""
    for one in graph.quantizers:
        if one.is_quantize:
            continue
        served = [node for node, _ in readers(one.node.outputs[0], through=frozenset(_MOVING | {QUANTIZE, DEQUANTIZE}))]
        wrong = [node for node in served if not _is_served(graph, node)]
        if wrong:
            kinds = sorted({node.op_type for node in wrong})
            yield Finding(one.name, f"{', '.join(kinds)} ({name_of(wrong[0])}) reads its result")
        elif not served and not one.node.outputs[0].uses():
            yield Finding(one.name, "nothing reads its result")


def half_quantized(graph: QdqGraph) -> Iterator[Finding]:
    """Both inputs of a product with a weight are quantised, or none."""
    for node in graph.nodes(*PRODUCTS):
        if len(node.inputs) < 2 or node in graph.attention_products or not is_constant(origin(node.inputs[1])):
            continue
        value, weight = is_quantized(node.inputs[0]), is_quantized(node.inputs[1])
        if value and not weight:
            yield Finding(name_of(node), "its activation is quantised, its weight is not")
        elif weight and not value and not graph.weight_only and not _is_four_bit(node.inputs[1]):
            yield Finding(name_of(node), "its weight is quantised, its activation is not")


def attention_half(graph: QdqGraph) -> Iterator[Finding]:
    """A fused INT8 or FP8 kernel wants Q/DQ on Q, K, the probabilities, V and the result."""
    for one in graph.attentions:
        missing = [part for part, there in _parts(one).items() if not there]
        if missing and len(missing) < 5 and _is_touched(one):
            yield Finding(name_of(one.scores), f"attention without Q/DQ on {', '.join(missing)}")


def attention_unfused(graph: QdqGraph) -> Iterator[Finding]:
    """Attention matmuls without a fused kernel of that precision stay in float."""
    for one in graph.attentions:
        if not _is_touched(one):
            continue
        precision = "fp8" if _has_fp8(one) else "int8"
        reason = unfused_reason(one, precision)
        if reason is not None:
            yield Finding(name_of(one.scores), f"quantised attention, and {reason}")


def attention_fp8_order(graph: QdqGraph) -> Iterator[Finding]:
    """FP8 attention: the scale acts on Q before its pair, K is transposed before its pair."""
    for one in graph.attentions:
        if not _is_touched(one) or not _has_fp8(one):
            continue
        if one.scalings:
            yield Finding(name_of(one.scalings[0]), "the scale acts on the scores, behind the pairs of Q and K")
        for value in one.scores.inputs:
            node = None if value is None else value.producer()
            if is_standard(node, *MOVES) and is_quantized(value) and node is not None:
                yield Finding(name_of(node), f"{node.op_type} stands between DequantizeLinear and the matmul")


def float16_norm(graph: QdqGraph) -> Iterator[Finding]:
    """Normalisations compute in FP32 in an FP16 graph, with casts around them."""
    for node in graph.nodes(*_NORMS, *_STATISTICS):
        if dtype_of(node.inputs[0]) != ir.DataType.FLOAT16:
            continue
        if node.op_type in _NORMS or _is_square(node.inputs[0]):
            yield Finding(name_of(node), f"{node.op_type} computes in FP16")


def float16_softmax(graph: QdqGraph) -> Iterator[Finding]:
    """Softmax computes in FP32 in an FP16 graph."""
    for node in graph.nodes("Softmax", "LogSoftmax"):
        if dtype_of(node.inputs[0]) == ir.DataType.FLOAT16:
            yield Finding(name_of(node), f"{node.op_type} computes in FP16")


def _is_square(value: ir.Value | None) -> bool:
    """Whether the mean of it is a norm's: the mean of plain features is a pooling."""
    node = None if value is None else value.producer()
    if node is None or not is_standard(node, "Pow", "Mul"):
        return False
    return node.op_type == "Pow" or node.inputs[0] is node.inputs[1]


def _unpaired_quantize(one: Quantizer) -> Iterator[Finding]:
    output = one.node.outputs[0]
    if output.is_graph_output():
        yield Finding(one.name, "its result is an output of the graph")
    uses = list(readers(output, through=MOVES))
    wrong = [node for node, _ in uses if not is_standard(node, DEQUANTIZE)]
    if wrong:
        yield Finding(one.name, f"{wrong[0].op_type} ({name_of(wrong[0])}) reads its result")
    elif not uses and not output.is_graph_output():
        yield Finding(one.name, "nothing reads its result")


def _is_served(graph: QdqGraph, node: ir.Node) -> bool:
    if is_standard(node, *PRODUCTS) or graph.is_residual(node):
        return True
    # What other rules report is not reported twice; Shape reads no numbers.
    named = is_standard(node, *_NORMS, *_ACTIVATIONS, *_STATISTICS, "Shape")
    return named or node in graph.mask_adds


def _parts(one: Attention) -> dict[str, bool]:
    parts = [one.scores.inputs[0], one.scores.inputs[1], one.mix.inputs[0], one.mix.inputs[1]]
    found = dict(zip(("Q", "K", "the probabilities", "V"), (is_quantized(value) for value in parts), strict=True))
    users = [node for node, _ in readers(one.mix.outputs[0], through=MOVES | {"Cast"})]
    found["the result"] = bool(users) and all(is_standard(node, QUANTIZE) for node in users)
    return found


def _is_touched(one: Attention) -> bool:
    """Whether an input of the matmuls is quantised; a pair on the result alone is the next product's own."""
    return any(is_quantized(value) for value in (*one.scores.inputs, *one.mix.inputs))


def _has_fp8(one: Attention) -> bool:
    return any(_quantized_type(value) == ir.DataType.FLOAT8E4M3FN for value in (*one.scores.inputs, *one.mix.inputs))


def _is_four_bit(value: ir.Value | None) -> bool:
    return _quantized_type(value) in (ir.DataType.INT4, ir.DataType.FLOAT4E2M1)


def _quantized_type(value: ir.Value | None) -> ir.DataType | None:
    while value is not None and (node := value.producer()) is not None:
        if is_standard(node, DEQUANTIZE):
            return dtype_of(node.inputs[0])
        value = node.inputs[0] if is_standard(node, *MOVES, "Cast") else None
    return None
