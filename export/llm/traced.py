"""Parts of a language model that torch.onnx traced: the passes of a decoder, INT4, the files."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ...models.contract import KvCacheContract, StageContract
from ..graph import drop_weights, fold_constants, save_graph
from ..passes import GraphPass, PassResult, apply_passes
from ..passes.axes import NameAxes
from ..passes.modules import KeepModuleScopes
from ..passes.weights import TransposeWeights
from .export import LlmGraph, decoder_shapes
from .int4 import quantize_matmuls

BUILDER = "torch.onnx"


def save_traced_decoder(
    model: ir.Model, contract: StageContract, cache: KvCacheContract, path: Path, precision: str
) -> LlmGraph:
    """Bring a traced `llm` to the contract's axes and write it; otherwise as `save_traced`."""
    weights = tuple(model.graph.initializers.values())
    fold_constants(model)
    passes: tuple[GraphPass, ...] = (
        KeepModuleScopes(),
        TransposeWeights(),
        NameAxes(decoder_shapes(contract, cache)),
    )
    model, results = apply_passes(model, passes, stage=contract.name)
    return save_traced(model, results, weights, path, precision)


def save_traced(
    model: ir.Model, passes: tuple[PassResult, ...], weights: tuple[ir.Value, ...], path: Path, precision: str
) -> LlmGraph:
    """Write `path`, its weights beside it as ``<name>.data``, and let go of them.

    ``precision``: "fp32", or "int4" for 4-bit weights. ``weights``: those of the graph as it was traced.
    """
    if precision == "int4":
        model = quantize_matmuls(model)
    save_graph(model, path)
    opset: int = model.graph.opset_imports[""]
    drop_weights((*weights, *model.graph.initializers.values()))
    return LlmGraph(BUILDER, passes, opset)
