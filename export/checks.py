"""What every exported graph must be, asserted on the files that were written.

A traced graph can be wrong without any error: a baked batch, a constant that FP16 cannot hold, a LayerNorm taken
apart. Each check raises ExportError that names the stage and the check; what passed goes into the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ..errors import ExportError
from ..models.contract import StageContract
from ..models.stages import ExampleInputs
from .graph import example_inputs
from .memory import release_memory
from .passes.axes import Dims, dims

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Arrays = Mapping[str, np.ndarray[tuple[int, ...], np.dtype[Any]]]

FP16_MAX = 65504.0
# Batch sizes at which ONNX Runtime must equal PyTorch; none is the traced one (2).
BATCH_SIZES = (1, 3, 5)
_OTHER_SIZES = (4, 1, 9)
# Two FP32 implementations of one network differ by the order of their sums: measured 1e-7 to 3e-6 of the largest
# value over 2 to 39 layers. The limits are ten times that; a wrong LayerNorm eps (1e-5 for 1e-6) on small activations
# or a swapped weight is far outside.
ABSOLUTE_OF_LARGEST = 3e-5
RELATIVE = 1e-4


@dataclass(frozen=True)
class Reference:
    """Inputs of a stage and what its PyTorch module made of them."""

    inputs: Arrays
    output: FloatArray


def check_sizes(contract: StageContract) -> list[dict[str, int]]:
    """Three settings of the dynamic axes: batch 1, 3 and 5, other axes within their bounds."""
    settings = []
    for batch, other in zip(BATCH_SIZES, _OTHER_SIZES, strict=True):
        wanted = {axis.name: batch if axis.name == "batch" else other for axis in contract.axes}
        settings.append({axis.name: min(max(wanted[axis.name], axis.min), axis.max) for axis in contract.axes})
    return settings


def make_references(
    module: nn.Module, contract: StageContract, *, max_id: int = 2, examples: ExampleInputs | None = None
) -> tuple[list[Reference], int]:
    """PyTorch's outputs at the sizes of `check_sizes`, and how many LayerNorm modules run.

    Modules and not calls: transformers' BLIP-2 encoder also norms a pooled token that no stage returns.
    """
    ran: set[nn.Module] = set()
    norms = [m for m in module.modules() if isinstance(m, nn.LayerNorm)]
    hooks = [norm.register_forward_hook(lambda norm, *_: ran.add(norm)) for norm in norms]
    references = []
    try:
        with torch.inference_mode():
            for seed, sizes in enumerate(check_sizes(contract), start=1):
                inputs = example_inputs(contract, sizes, seed=seed, max_id=max_id, examples=examples)
                output = module(*inputs.values())
                references.append(Reference({k: v.numpy() for k, v in inputs.items()}, output.numpy()))
    finally:
        for hook in hooks:
            hook.remove()
    return references, len(ran)


def check_structure(
    path: Path, shapes: Mapping[str, Dims], *, stage: str, opset: int, layer_norms: int | None, standard: bool
) -> dict[str, Any]:
    """Check the graph at `path` without running it.

    ``shapes``: name -> shape of every input and output, axis names included. ``layer_norms``: how many the stage's
    modules ran, None where other operators stand for them. ``standard``: no operator outside ai.onnx.
    Returns what was found; raises ExportError.
    """
    model = ir.load(path)
    found: dict[str, Any] = {
        "axes": _check_axes(model, shapes, stage),
        "opset": _check_opset(model, opset, stage),
        "largest_constant": _check_constants(model, stage),
    }
    if standard:
        found["operators"] = _check_standard(model, stage)
        found["onnx_checker"] = _check_onnx(path, stage)
    if layer_norms is not None:
        found["layer_normalization"] = _check_layer_norms(model, layer_norms, stage)
    # The graph is full of cycles, and while it lives its weights stay mapped, page by page as they were read.
    del model
    release_memory()
    return found


def check_equality(path: Path, references: Sequence[Reference], *, stage: str, output: str) -> dict[str, Any]:
    """ONNX Runtime's `output` against PyTorch's for every reference; raises ExportError with max, mean and where."""
    session = open_session(path)
    worst = 0.0
    for reference in references:
        result = session.run([output], dict(reference.inputs))[0]
        worst = max(worst, compare(result, reference, stage=stage, output=output))
    return {"batch_sizes": [_batch(reference) for reference in references], "max_abs": worst}


def open_session(path: Path, *, prepack: bool = False) -> Any:
    """An `InferenceSession` on the CPU for a few runs.

    ``prepack``: pack a second copy of every weight, which pays off over many runs and not over three; 4-bit kernels
    compute with INT8 activations only when packed.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compare(result: Any, reference: Reference, *, stage: str, output: str, of_largest: float | None = None) -> float:
    """The largest absolute difference; raises ExportError when any element is beyond the tolerance.

    ``of_largest``: the absolute part, as a fraction of the largest value, where FP32's does not fit.
    """
    expected = reference.output
    absolute = ABSOLUTE_OF_LARGEST if of_largest is None else of_largest
    where = f"stage {stage}, check onnxruntime: {output} at batch {_batch(reference)}"
    if result.shape != expected.shape:
        raise ExportError(
            f"{where} has shape {list(result.shape)}, PyTorch gives {list(expected.shape)}; an axis was baked in, "
            "please report this model"
        )
    difference = np.abs(result - expected)
    limit = absolute * float(np.abs(expected).max()) + RELATIVE * np.abs(expected)
    if not bool(np.all(difference <= limit)):
        index = np.unravel_index(int(np.argmax(np.nan_to_num(difference - limit, nan=np.inf))), difference.shape)
        place = [int(i) for i in index]
        raise ExportError(
            f"{where} differs from PyTorch by {difference[index]:.3g} at {place} ({result[index]:.6g} instead of "
            f"{expected[index]:.6g}; max {difference.max():.3g}, mean {difference.mean():.3g}); the graph does not "
            "compute what the checkpoint does, please report this model"
        )
    return float(difference.max())


def _batch(reference: Reference) -> int:
    return int(next(iter(reference.inputs.values())).shape[0])


def _check_axes(model: ir.Model, shapes: Mapping[str, Dims], stage: str) -> list[str]:
    """Every input and output has the contract's shape, symbol for symbol; returns the symbols."""
    ends = {value.name or "": dims(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for name, wanted in shapes.items():
        if name not in ends:
            raise ExportError(f"stage {stage}, check axes: {name} is missing; the graph has {sorted(ends)}")
        if ends[name] != wanted:
            raise ExportError(
                f"stage {stage}, check axes: {name} is {list(ends[name] or ())}, the contract has {list(wanted)}; "
                "an axis was baked in or got another name, export with other example sizes"
            )
    if extra := sorted(set(ends) - set(shapes)):
        raise ExportError(f"stage {stage}, check axes: {extra} are not in the contract, which has {sorted(shapes)}")
    return sorted({dim for shape in shapes.values() for dim in shape if isinstance(dim, str)})


def _check_opset(model: ir.Model, opset: int, stage: str) -> int:
    got = model.graph.opset_imports.get("")
    if got != opset:
        raise ExportError(f"stage {stage}, check opset: the graph has {got}, {opset} is wanted; export again")
    return opset


def _check_constants(model: ir.Model, stage: str) -> float:
    """Every float constant must be finite and within FP16, or a later cast makes infinities of it."""
    largest = 0.0
    for name, tensor in _constants(model):
        if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16) or tensor.size == 0:
            continue
        array = tensor.numpy()
        # Minimum and maximum, and not abs(): no copy of the weight is made.
        value = max(float(array.max()), -float(array.min()))
        if not value <= FP16_MAX:
            raise ExportError(
                f"stage {stage}, check fp16 range: constant {name} holds {value:.6g}, beyond {FP16_MAX:.0f}; "
                "a mask must use -1e4, and a weight this large cannot be run in FP16"
            )
        largest = max(largest, value)
    return largest


def _constants(model: ir.Model) -> list[tuple[str, ir.TensorProtocol]]:
    found = [
        (name, value.const_value) for name, value in model.graph.initializers.items() if value.const_value is not None
    ]
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                found.append((f"{node.name}.{attribute.name}", attribute.as_tensor()))
            elif attribute.type == ir.AttributeType.FLOAT and node.op_type == "Constant":
                found.append((f"{node.name}", ir.tensor([attribute.as_float()])))
    return found


def _check_standard(model: ir.Model, stage: str) -> dict[str, int]:
    if model.functions:
        names = sorted(str(key) for key in model.functions)
        raise ExportError(f"stage {stage}, check operators: local functions are left ({names}); report this model")
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx"):
            raise ExportError(
                f"stage {stage}, check operators: {node.name} is {node.domain}.{node.op_type}; only ai.onnx is "
                "accepted, which every engine reads"
            )
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def _check_layer_norms(model: ir.Model, expected: int, stage: str) -> int:
    found = sum(node.op_type == "LayerNormalization" for node in model.graph.all_nodes())
    if found != expected:
        raise ExportError(
            f"stage {stage}, check layer_normalization: {found} LayerNormalization in the graph, the modules ran "
            f"{expected}; a norm was taken apart, which costs FP16 its accuracy"
        )
    return found


def _check_onnx(path: Path, stage: str) -> str:
    import onnx

    try:
        # By path, because a model over 2 GB cannot be checked in memory.
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"stage {stage}, check onnx_checker: {reason}; please report this model") from error
    return "clean"
