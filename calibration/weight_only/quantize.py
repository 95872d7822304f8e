"""Weight-only quantisation of a language model's graph: MatMul weights in blocks, everything else as it was.

Targets differ in what they read. ONNX Runtime (`cpu`, `cuda`): MatMulNBits (com.microsoft), weights packed by its own
kernels. TensorRT: DequantizeLinear before the MatMul, symmetric, scales above 0; 4 bits in blocks along K (opset 21),
8 bits with one scale for each output channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...errors import InputError
from ...export.graph import save_graph
from ...export.llm.genai import ACCURACY_LEVEL, BLOCK_SIZE
from ...export.passes.gqa import CONTRIB
from ...export.passes.match import producer
from ...export.quiet import quiet_exporters
from .blocks import BlockedWeight, Floats, pack_for_matmul_nbits, positive_scales, round_to_nearest, signed_scales
from .gptq import Doubles, collect_hessians, gptq
from .rewrite import insert_dequantize, replace_by_matmul_nbits

_BITS = (4, 8)
_METHODS = ("rtn", "gptq")
_TARGETS = ("cpu", "cuda", "tensorrt")
_BLOCK_SIZES = {"cpu": (16, 32, 64, 128, 256), "cuda": (16, 32, 64, 128), "tensorrt": (32, 64, 128)}
# Memory for the Hessians of one pass over the calibration samples; more layers than fit cost another pass.
_HESSIAN_BYTES = 2 * 2**30
_QUANTIZED = frozenset({"MatMulNBits", "MatMulInteger", "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"})


@dataclass(frozen=True)
class _Layer:
    """A MatMul with a weight, to be stored in blocks of `block_size`.

    `observed`: the value whose rows are its inputs, of all tokens where there are more.
    """

    node: ir.Node
    weight: ir.Value
    observed: str
    block_size: int

    @property
    def rows(self) -> int:
        return int(_tensor(self.weight).shape.numpy()[0])


def quantize_weights(
    decoder: Path,
    out: Path,
    *,
    bits: int = 4,
    block_size: int = BLOCK_SIZE,
    method: str = "rtn",
    target: str = "cpu",
    inputs: Iterable[Mapping[str, NDArray[Any]]] | None = None,
    keep: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Write `decoder` with quantised weights to `out`, its weights beside it as ``<name>.data``.

    ``method``: "rtn" rounds to nearest; "gptq" needs ``inputs``, samples of the graph's inputs; an empty cache is added
    where they have none, and all are held in memory. They should hold what the model writes and not prompts alone (see
    `generation_inputs`). ``keep``: names of MatMul nodes that stay as they are. Weights are read one at a time; those
    already quantised stay in memory until they are written (1/8 of FP32 for 4 bits).

    TensorRT takes whole blocks: a layer whose K is no multiple of ``block_size`` gets the next smaller size that fits,
    down to 32, or stays as it is.

    Returns what was done: bits, block_size (None for one scale per channel), other_block_sizes (node -> size), method,
    target, layers, kept (node -> why), weight_bytes before and after. Raises InputError for options that do not go
    together and for a graph that is quantised already, CalibrationError for samples that are not finite.
    """
    _check(decoder, out, bits, block_size, method, target, inputs)
    model = ir.load(decoder)
    sizes = [size for size in _BLOCK_SIZES[target] if size <= block_size] if target == "tensorrt" and bits == 4 else []
    layers, kept = _find_layers(model, keep, block_size, sizes)
    before = sum(_tensor(layer.weight).nbytes for layer in layers)
    samples = [] if inputs is None or method == "rtn" else list(inputs)
    after = 0
    for group in _groups(layers) if method == "gptq" else [layers]:
        names = list(dict.fromkeys(layer.observed for layer in group))
        hessians = collect_hessians(decoder, names, samples) if method == "gptq" else {}
        for layer in group:
            after += _quantize(model, layer, bits, target, hessians.get(layer.observed))
    if target != "tensorrt":
        model.graph.opset_imports[CONTRIB] = 1
    elif bits == 4:
        model.graph.opset_imports[""] = max(21, model.graph.opset_imports[""])
    model.ir_version = max(10, model.ir_version)
    save_graph(model, out)
    return {
        "bits": bits,
        "block_size": block_size if bits == 4 or target != "tensorrt" else None,
        "other_block_sizes": {layer.node.name: layer.block_size for layer in layers if layer.block_size != block_size},
        "method": method,
        "target": target,
        "layers": len(layers),
        "kept": kept,
        "weight_bytes": {"before": before, "after": after},
    }


def _check(
    decoder: Path, out: Path, bits: int, block_size: int, method: str, target: str, inputs: object | None
) -> None:
    for what, got, accepted in (
        ("bits", bits, _BITS),
        ("method", method, _METHODS),
        ("target", target, _TARGETS),
        ("block_size", block_size, _BLOCK_SIZES.get(target, ())),
    ):
        if got not in accepted:
            raise InputError(f"weight-only {what} {got!r}: accepted are {', '.join(map(str, accepted))}")
    if method == "gptq" and inputs is None:
        raise InputError("weight-only method gptq needs calibration inputs; give some, or use method rtn")
    if method == "gptq" and bits == 8:
        raise InputError("weight-only method gptq is for 4 bits; with 8 rounding to nearest loses nothing, use rtn")
    if out.resolve() == decoder.resolve():
        raise InputError(f"{out}: the result cannot replace the graph that it is made from; give another path")


def _find_layers(
    model: ir.Model, keep: frozenset[str], block_size: int, fitting: list[int]
) -> tuple[list[_Layer], dict[str, str]]:
    """MatMuls with a float matrix, and why others are left. ``fitting``: block sizes of which one must divide K."""
    nodes = [node for node in model.graph if node.op_type == "MatMul" and node.domain == ""]
    if unknown := sorted(keep - {node.name or "" for node in nodes}):
        raise InputError(f"weight-only keep list: {unknown[0]!r} is no MatMul of this graph; look names up in it")
    for node in model.graph:
        if node.op_type in _QUANTIZED:
            raise InputError(f"{node.name}: the graph is quantised already; start from the FP32 bundle")
    layers: list[_Layer] = []
    kept: dict[str, str] = {}
    for node in nodes:
        states, weight = node.inputs
        if states is None or weight is None or weight.const_value is None:
            continue
        shape = weight.const_value.shape.numpy()
        if node.name in keep:
            kept[node.name or ""] = "asked for"
        elif len(shape) != 2 or not weight.const_value.dtype.is_floating_point():
            kept[node.name or ""] = f"weight {list(shape)} {weight.const_value.dtype.name} is no float matrix"
        elif fitting and all(shape[0] % size for size in fitting):
            kept[node.name or ""] = f"K {shape[0]} is no multiple of a block size ({', '.join(map(str, fitting))})"
        else:
            size = max((one for one in fitting if shape[0] % one == 0), default=block_size)
            layers.append(_Layer(node, weight, _observed(states), size))
    return layers, kept


def _observed(states: ir.Value) -> str:
    """The LM head reads one token of each row; its inputs are those of all tokens."""
    gather = producer(states, "GatherND")
    source = states if gather is None or gather.inputs[0] is None else gather.inputs[0]
    return source.name or ""


def _groups(layers: list[_Layer]) -> list[list[_Layer]]:
    """Layers in order, as many together as the memory for their Hessians allows."""
    groups: list[list[_Layer]] = [[]]
    held: dict[str, int] = {}
    for layer in layers:
        if layer.observed not in held and held and sum(held.values()) + 8 * layer.rows**2 > _HESSIAN_BYTES:
            groups.append([])
            held = {}
        held[layer.observed] = 8 * layer.rows**2
        groups[-1].append(layer)
    return groups


def _quantize(model: ir.Model, layer: _Layer, bits: int, target: str, hessian: Doubles | None) -> int:
    """Put the quantised weight in the place of the layer's; returns its bytes, 0 where another layer shares it."""
    if layer.node.inputs[1] is not layer.weight:
        return 0
    weight = np.ascontiguousarray(_tensor(layer.weight).numpy(), np.float32)
    if target == "tensorrt":
        size = layer.block_size if bits == 4 else len(weight)
        blocked = _blocked(weight, bits, size, target, hessian)
        return insert_dequantize(model, layer.weight, blocked, bits)
    if hessian is None:
        packed, scales = _pack_with_kernel(weight, bits, layer.block_size)
    else:
        packed, scales = pack_for_matmul_nbits(_blocked(weight, bits, layer.block_size, target, hessian), bits)
    attributes = {"K": weight.shape[0], "N": weight.shape[1], "bits": bits, "block_size": layer.block_size}
    if target == "cpu":
        attributes["accuracy_level"] = ACCURACY_LEVEL
    replace_by_matmul_nbits(model, layer.weight, packed, scales, attributes)
    return packed.nbytes + scales.nbytes


def _blocked(weight: Floats, bits: int, block_size: int, target: str, hessian: Doubles | None) -> BlockedWeight:
    rule = positive_scales if target == "tensorrt" else signed_scales
    if hessian is None:
        return round_to_nearest(weight, bits, block_size, rule)
    return gptq(weight, hessian, bits, block_size, rule)


def _pack_with_kernel(weight: Floats, bits: int, block_size: int) -> tuple[NDArray[np.uint8], Floats]:
    """ONNX Runtime's own rounding, without the whole model in a protobuf, which its quantizer asks for."""
    with quiet_exporters():
        # Inside the block, because the import itself sets up logging.
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )

    config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, bits=bits)
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight)
    return packed, scales


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise InputError(f"{value.name}: the weight has no numbers; export the bundle again")
    return value.const_value
