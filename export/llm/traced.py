"""Parts of a language model that torch.onnx traced: the passes of a decoder, INT4, the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from ...errors import ExportError
from ...models.contract import KvCacheContract, StageContract
from ..graph import OPSET, drop_weights, fold_constants, save_graph
from ..passes import GraphPass, PassResult, apply_passes
from ..passes.axes import NameAxes
from ..passes.modules import KeepModuleScopes
from ..passes.weights import TransposeWeights
from ..quiet import quiet_exporters
from .export import LlmGraph, decoder_shapes
from .int4 import quantize_matmuls

BUILDER = "torch.onnx"


def trace_decoder_graph(
    module: nn.Module,
    inputs: tuple[Any, ...],
    shapes: tuple[Any, ...],
    contract: StageContract,
    cache: KvCacheContract,
    *,
    what: str,
    needed: str,
) -> ir.Model:
    """The graph of `llm`, with the names of the contract and the cache, not yet passed through anything.

    ``shapes``: the dynamic axes of ``inputs``. Raises ExportError when torch.onnx cannot trace it: ``what`` that is,
    and what is ``needed``.
    """
    slots = [(layer, kind) for layer in range(cache.num_layers) for kind in ("key", "value")]
    past, present = ([name.format(layer=i, kind=kind) for i, kind in slots] for name in (cache.past, cache.present))
    try:
        with quiet_exporters(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=[*(spec.name for spec in contract.inputs), *past],
                output_names=["logits", *present],
                dynamic_shapes=shapes,
                optimize=False,
                verify=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ExportError(
            f"stage {contract.name}: torch.onnx cannot trace {what} ({reason}); it needs {needed} or another version "
            "of torch"
        ) from error
    model: ir.Model = program.model  # type: ignore[union-attr]  # None only for dynamo=False
    return model


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
