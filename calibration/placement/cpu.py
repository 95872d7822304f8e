"""INT8 for ONNX Runtime's CPU provider (and for OpenVINO) as a graph pass: one scheme of several.

Weights are symmetric INT8 with a scale for each output channel, activations UINT8 per tensor: the pair that VNNI
multiplies. What differs is where activations get their scale from and which operators carry the products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ...errors import InputError
from ...export.graph import save_graph
from ...export.passes import GraphPass, apply_passes
from ...export.passes.gemm import MatMulFromGemm
from ..records import TensorRange
from .attention import find_attentions
from .cpu_attention import find_self_attentions, fuse_attention
from .cpu_parts import Dynamic, Quantized, Static, WeightFormat, find_linear_parts, replace_linear
from .cpu_qdq import place_qdq
from .patterns import infer_types
from .plan import KEPT


@dataclass(frozen=True)
class CpuScheme:
    """One way to compute in INT8 on a CPU.

    `activations`: "dynamic" (scale found at run time), "static" (from calibration) or "qdq" (likewise, as
    QuantizeLinear and DequantizeLinear pairs of the standard, which every runtime reads). `attention`: whether
    self-attention is one operator too ("fused": projections in INT8, the rest in float) or its batch matmuls are
    quantised ("qdq"). `engines`: what runs it in INT8.
    """

    activations: str
    attention: str = "float"
    engines: tuple[str, ...] = ("onnxruntime",)

    @property
    def needs_ranges(self) -> bool:
        """Whether activations must have been observed."""
        return self.activations != "dynamic"


# Measured on ViT-L/14 and a 12-layer Q-Former: docs/quantization.md has the figures, and those of what lost.
CPU_SCHEMES: dict[str, CpuScheme] = {
    "dynamic-s8": CpuScheme("dynamic"),
    "dynamic-s8-attention": CpuScheme("dynamic", "fused"),
    "static-u8s8": CpuScheme("static"),
    "static-u8s8-attention": CpuScheme("static", "fused"),
    "qdq-u8s8": CpuScheme("qdq", engines=("onnxruntime", "openvino")),
    "qdq-u8s8-attention": CpuScheme("qdq", "qdq", engines=("openvino",)),
}


@dataclass(frozen=True)
class CpuPlacement:
    """What was done. `quantized`: names of products in INT8; `fused`: softmaxes whose attention became one operator,
    or whose batch matmuls are INT8; `left`: product -> why it stays in float.
    """

    quantized: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    left: Mapping[str, str] | None = None


class PlaceCpu(GraphPass):
    """Rewrite all products with a constant weight to `scheme`; what was done is in `placement` afterwards.

    `ranges`: value name -> range, for every name of `watch_cpu`; dynamic schemes need none. `keep`: products that stay
    in float. `weight_bits`: 7 where the processor has no VNNI, since sums of U8 times S8 saturate there.
    Raises InputError for a scheme that is not known, and for a range that is missing.
    """

    name = "place-cpu"
    mandatory = True

    def __init__(
        self,
        scheme: str,
        ranges: Mapping[str, TensorRange] | None = None,
        *,
        keep: frozenset[str] = frozenset(),
        weight_bits: int = 8,
    ) -> None:
        self._scheme = known_scheme(scheme)
        self._ranges, self._weights = ranges or {}, WeightFormat(weight_bits)
        # A Gemm becomes the MatMul of this name.
        self._keep = keep | {f"{name}/MatMul" for name in keep}
        self.placement = CpuPlacement()

    def requires(self, model: ir.Model) -> str | None:
        """The graph must have products to quantise and not be quantised yet."""
        if any(node.op_type in _QUANTIZED for node in model.graph):
            return "the graph is quantised already"
        return None if find_linear_parts(model) else "no product with a constant weight"

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Rewrite, and drop the float weights."""
        left = {part.node.name or "": KEPT for part in find_linear_parts(model) if part.node.name in self._keep}
        if self._scheme.activations == "qdq":
            quantized, fused = place_qdq(
                model, self._ranges, self._weights, keep=self._keep, attention=self._scheme.attention == "qdq"
            )
        else:
            quantized, fused = self._contributed(model)
        left |= {node.name or "": "no matrix of weights" for node in model.graph if node.op_type == "Conv"}
        self.placement = CpuPlacement(quantized, fused, left)
        return model, bool(quantized)

    def ensures(self, model: ir.Model) -> str | None:
        """No product is in float that was not to be kept."""
        float_left = [part.node.name for part in find_linear_parts(model) if part.node.name not in self._keep]
        return f"products are left in float: {float_left[:3]}" if float_left else None

    def _contributed(self, model: ir.Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Operators of ONNX Runtime's own."""
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        activations: Quantized = Dynamic() if self._scheme.activations == "dynamic" else Static(self._ranges)
        quantized, fused = [], []
        if self._scheme.attention == "fused":
            for one in find_self_attentions(model):
                if not self._keep & one.names:
                    quantized += sorted(one.names)
                    fused.append(one.softmax.name or "")
                    fuse_attention(model, one, activations, self._weights)
        for part in find_linear_parts(model):
            if part.node.name not in self._keep:
                quantized.append(part.node.name or "")
                replace_linear(model, part, activations, self._weights)
        return tuple(quantized), tuple(fused)


_QUANTIZED = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulIntegerToFloat", "QAttention", "MatMulNBits"}
)


def known_scheme(name: str) -> CpuScheme:
    """The record of a scheme; InputError lists those that there are."""
    if name not in CPU_SCHEMES:
        raise InputError(f"scheme {name!r} is unknown; known for cpu are {', '.join(CPU_SCHEMES)}")
    return CPU_SCHEMES[name]


def watch_cpu(model: ir.Model) -> tuple[str, ...]:
    """Names of the values whose ranges the static schemes need, each once."""
    names = [part.x.name or "" for part in find_linear_parts(model)]
    # A Gemm reads the same value before it becomes a MatMul.
    names += [
        node.inputs[0].name or "" for node in model.graph if node.op_type == "Gemm" and node.inputs[0] is not None
    ]
    for one in find_attentions(model):
        values = (*one.scores.inputs, *one.mix.inputs)
        names += [value.name or "" for value in values if value is not None]
    return tuple(dict.fromkeys(names))


def quantize_cpu(
    graph: Path,
    out: Path,
    ranges: Mapping[str, TensorRange] | None = None,
    keep: frozenset[str] = frozenset(),
    scheme: str = "dynamic-s8",
    *,
    weight_bits: int = 8,
    stage: str = "graph",
) -> CpuPlacement:
    """Write the FP32 graph at `graph` to `out` in `scheme`.

    Raises what `PlaceCpu` does, and ExportError for a graph without products.
    """
    model = ir.load(graph)
    placement = PlaceCpu(scheme, ranges, keep=keep, weight_bits=weight_bits)
    model = place(model, placement, stage=stage)
    save_graph(model, out)
    return placement.placement


def place(model: ir.Model, placement: PlaceCpu, *, stage: str) -> ir.Model:
    """`placement` on a float graph whose values need not state their shapes."""
    infer_types(model)
    model, _ = apply_passes(model, (MatMulFromGemm(), placement), stage=stage)
    return model
