"""One PyTorch stage to an ONNX graph on disk.

`torch.onnx.export(dynamo=True)` traces the stage with an example whose dynamic axes are at least 2 (a size of 1 is
silently baked into the graph) and with one named `Dim` for each axis of the contract; the passes then make of it what
every engine knows: LayerNormalization, MatMul, Softmax, no local functions, no contributed operators.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..models.contract import StageContract
from ..models.stages import ExampleInputs
from .passes import GraphPass, PassResult, apply_passes
from .passes.axes import NameAxes
from .passes.modules import KeepModuleScopes
from .passes.qkv import SplitFusedQkv
from .passes.weights import TransposeWeights
from .quiet import quiet_exporters

OPSET = 20
# Sizes of the dynamic axes of the traced example, in the order of the contract: never 0 or 1, and all different, so
# that two axes cannot be taken for one.
_EXAMPLE_SIZES = (2, 3, 5, 7)
_TORCH_DTYPES = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}


@dataclass(frozen=True)
class ExportedGraph:
    """A graph in memory, its weights still those of the PyTorch module, and what the passes did."""

    model: ir.Model
    passes: tuple[PassResult, ...]
    traced_weights: tuple[ir.Value, ...] = ()


def stage_passes() -> Sequence[GraphPass]:
    """The passes that every traced stage goes through, in order."""
    return (KeepModuleScopes(), TransposeWeights(), SplitFusedQkv())


def example_inputs(
    contract: StageContract,
    sizes: dict[str, int],
    *,
    seed: int = 0,
    max_id: int = 2,
    examples: ExampleInputs | None = None,
) -> dict[str, Tensor]:
    """Random inputs of the stage at the given axis sizes: those of `examples`, else normal floats and ids in
    ``[0, max_id)``.
    """
    generator = torch.Generator().manual_seed(seed)
    if examples is not None:
        made = examples(sizes, generator)
        return {spec.name: made[spec.name] for spec in contract.inputs}
    inputs = {}
    for spec in contract.inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        dtype = _TORCH_DTYPES[spec.dtype]
        if dtype.is_floating_point:
            inputs[spec.name] = torch.randn(shape, generator=generator, dtype=dtype)
        else:
            inputs[spec.name] = torch.randint(0, max_id, shape, generator=generator, dtype=dtype)
    return inputs


def _name_outputs(contract: StageContract) -> Sequence[GraphPass]:
    """An axis that only outputs have was traced as an expression of others, and is given its name."""
    inputs = {dim for spec in contract.inputs for dim in spec.shape}
    if all(dim in inputs or isinstance(dim, int) for spec in contract.outputs for dim in spec.shape):
        return ()
    return (NameAxes({spec.name: spec.shape for spec in (*contract.inputs, *contract.outputs)}),)


def trace_stage(
    module: nn.Module, contract: StageContract, *, max_id: int = 2, examples: ExampleInputs | None = None
) -> ExportedGraph:
    """Trace `module` (tensors in, one tensor out) into a graph with the contract's names and axes.

    The graph's weights are views of the module's parameters until `save_graph` has written them.
    """
    sizes = {
        axis.name: min(max(example, axis.min), axis.max)
        for axis, example in zip(contract.axes, _EXAMPLE_SIZES, strict=False)
    }
    dims = {axis.name: torch.export.Dim(axis.name, min=axis.min, max=axis.max) for axis in contract.axes}
    inputs = example_inputs(contract, sizes, max_id=max_id, examples=examples)
    shapes = tuple(
        {i: dims[dim] for i, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in contract.inputs
    )
    try:
        with quiet_exporters(), torch.no_grad():
            program = torch.onnx.export(
                module,
                tuple(inputs[spec.name] for spec in contract.inputs),
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in contract.inputs],
                output_names=[spec.name for spec in contract.outputs],
                dynamic_shapes=shapes,
                optimize=False,
                verify=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ExportError(
            f"stage {contract.name}: torch.onnx cannot trace it ({reason}); its module must keep the axes "
            f"{[axis.name for axis in contract.axes]} dynamic"
        ) from error
    model: ir.Model = program.model  # type: ignore[union-attr]  # None only for dynamo=False
    weights = tuple(model.graph.initializers.values())
    fold_constants(model)
    model, results = apply_passes(model, (*stage_passes(), *_name_outputs(contract)), stage=contract.name)
    return ExportedGraph(model, results, weights)


def fold_constants(model: ir.Model) -> None:
    """onnxscript's optimizer, except that it may not fold a whole weight.

    The folded copy of a transposed weight would double the memory of the stage; `TransposeWeights` does it on the way
    to the disk.
    """
    from onnxscript import optimizer

    def should_fold(node: ir.Node) -> bool | None:
        return False if node.op_type == "Transpose" and node.inputs[0] in model.graph.initializers.values() else None

    with quiet_exporters():
        optimizer.optimize_ir(model, should_fold=should_fold)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write `path` and its weights beside it as ``<name>.data``; the protobuf itself stays far below 2 GB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)


def trace_and_save(module: nn.Module, contract: StageContract, path: Path, **options: Any) -> tuple[PassResult, ...]:
    """`trace_stage`, `save_graph`; returns what the passes did."""
    traced = trace_stage(module, contract, **options)
    save_graph(traced.model, path)
    drop_weights((*traced.traced_weights, *traced.model.graph.initializers.values()))
    return traced.passes


def drop_weights(weights: Iterable[ir.Value]) -> None:
    """Let go of the tensors of a graph that is done with.

    onnxscript's rewrite rules are module-level objects that remember their last match, and with it the whole graph:
    without this the weights of one stage stay in memory until another one is optimised.
    """
    for value in weights:
        value.const_value = None
