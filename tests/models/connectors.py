"""What every connector must do: equal its reference, and keep its axes when it is exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from tests.checkpoints import randomize
from torch import Tensor, nn

from bridgeport.export.checks import check_equality, check_structure, make_references
from bridgeport.export.graph import OPSET, trace_and_save
from bridgeport.models.contract import Axis, StageContract, TensorSpec

# FP32 sums of up to some hundred terms in up to three layers, values of order 1 to 10. Observed: at most 5e-6.
TOLERANCE = 2e-5
# What a wrong weight, mask or order must at least do to the output to count as caught: 50 x the tolerance.
CAUGHT = 1e-3


def connector_contract(
    inputs: Mapping[str, tuple[int | str, ...]], output: tuple[int | str, ...], *, masks: tuple[str, ...] = ()
) -> StageContract:
    """A connector's contract; every name in a shape is an axis of 1 to 64. `masks` are the inputs of int64."""
    dims = dict.fromkeys(dim for shape in (*inputs.values(), output) for dim in shape if isinstance(dim, str))
    return StageContract(
        name="connector",
        inputs=tuple(
            TensorSpec(name=name, dtype="int64" if name in masks else "float32", shape=shape)
            for name, shape in inputs.items()
        ),
        outputs=(TensorSpec(name="image_features", dtype="float32", shape=output),),
        axes=tuple(Axis(name=dim, min=1, opt=2, max=64) for dim in dims),
    )


def prepare(module: nn.Module, seed: int) -> nn.Module:
    """Random weights in every part, norms and biases included; eval mode."""
    randomize(module, seed)
    return module.eval().requires_grad_(False)


def copy_weights(source: nn.Module, target: nn.Module, names: Mapping[str, str] | None = None) -> None:
    """Give `target` the weights of `source`; `names`: target's name to source's. Every weight of both must be used."""
    state = source.state_dict()
    names = names if names is not None else {name: name for name in target.state_dict()}
    assert sorted(names.values()) == sorted(state), "the names do not cover the reference's weights"
    target.load_state_dict({ours: state[theirs] for ours, theirs in names.items()}, strict=True)
    target.eval().requires_grad_(False)


def assert_equal(got: Tensor, want: Tensor) -> None:
    """Within `TOLERANCE`, of outputs that are not all but zero."""
    assert got.shape == want.shape
    assert float(want.abs().mean()) > 0.05, "the reference's output is too small for the tolerance to mean anything"
    difference = (got - want).abs()
    where = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    assert float(difference.max()) <= TOLERANCE, f"max {difference.max():.3g}, mean {difference.mean():.3g}, at {where}"


def export(module: nn.Module, contract: StageContract, directory: Path) -> dict[str, Any]:
    """Trace `module` to ONNX and pass every check of an exported stage: axes, operators, equality at three sizes.

    Returns how often each operator stands in the graph.
    """
    references, layer_norms = make_references(module, contract)
    path = directory / "connector.onnx"
    trace_and_save(module, contract, path)
    shapes = {spec.name: spec.shape for spec in (*contract.inputs, *contract.outputs)}
    found = check_structure(path, shapes, stage="connector", opset=OPSET, layer_norms=layer_norms, standard=True)
    check_equality(path, references, stage="connector", output=contract.outputs[0].name)
    operators: dict[str, Any] = found["operators"]
    return operators


def weights_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The graph's stored tensors and their shapes."""
    model = ir.load(path)
    return {name: tuple(value.shape.numpy()) for name, value in model.graph.initializers.items() if value.shape}
