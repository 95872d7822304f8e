"""All checks of one ONNX graph, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from ...calibration.placement.patterns import infer_types
from ...calibration.rules_graph import dtype_of
from ...errors import InputError
from ...models.contract import StageContract
from ...runtime.tensorrt.versions import Version
from ..memory import release_memory
from . import attention, constants, dtypes, files, operators, quantization, shapes, tables
from .findings import Finding
from .subject import Subject

# Those of the first group ask about single nodes: they run also when external data is missing.
STRUCTURE: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    operators.check_opset,
    operators.check_operators,
    operators.check_attributes,
)
CONTENT: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    operators.check_interfaces,
    dtypes.check_types,
    dtypes.check_uint8,
    dtypes.check_operator_types,
    dtypes.check_mixed_types,
    shapes.check_control_flow,
    shapes.check_top_k,
    shapes.check_data_dependence,
    constants.check_constants,
    attention.check_written_out,
    attention.check_operator,
    quantization.check_quantization,
)
_LARGE = 2**24
_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "bool": ir.DataType.BOOL,
}


def check_graph(path: Path, contract: StageContract | None, version: Version, *, stage: str) -> list[Finding]:
    """What would stop or hurt the build of the ONNX file `path` by TensorRT `version`; empty for a clean graph.

    Takes any graph: external data, more than 2 GB of it, subgraphs, functions, operators of other domains. Weights are
    read one at a time and only for their range. `contract`: what the stage promises, None for a foreign graph. Equal
    findings at several nodes are one finding, which names the first node and counts the others. Where external data is
    missing or the graph is no valid ONNX, only what needs neither weights nor shapes is checked. Raises InputError for
    a file that is no ONNX model and for a version older than the tables.
    """
    tables.check_version(version)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the path of an .onnx file")
    too_large = files.check_size(path, stage)
    if too_large is not None:
        return [too_large]
    model = _load(path)
    found = list(operators.check_functions(path, model, stage))
    if model.functions:
        InlinePass()(model)
    subject = Subject(path, model, stage, version)
    found += [*files.check_external_data(subject), *operators.check_validity(subject)]
    is_whole = not any(one.check in ("external-data", "invalid") and one.severity == "error" for one in found)
    if is_whole:
        infer_types(model)
    if contract is not None:
        found.extend(check_contract(subject, contract))
    for check in (*STRUCTURE, *(CONTENT if is_whole else ())):
        found.extend(check(subject))
    del subject, model
    if path.stat().st_size > _LARGE:
        release_memory()  # the graph is full of cycles, and while it lives its weights do
    return merge_equal(found)


def check_contract(subject: Subject, contract: StageContract) -> Iterator[Finding]:
    """The graph's inputs and outputs are those of the contract, with their types."""
    graph = subject.model.graph
    for kind, specs, values in (("input", contract.inputs, graph.inputs), ("output", contract.outputs, graph.outputs)):
        given = {value.name: value for value in values}
        fix = "export the stage again, or correct the contract"
        for spec in specs:
            if spec.name not in given:
                why = f"the contract has the {kind} {spec.name}, the graph has {sorted(name or '?' for name in given)}"
                yield subject.finding("contract", "error", spec.name, why, fix)
                continue
            dtype = dtype_of(given[spec.name])
            if dtype is not None and dtype != _DTYPES[spec.dtype]:
                why = f"the contract has {kind} {spec.name} as {spec.dtype}, the graph as {dtype.name.lower()}"
                yield subject.finding("contract", "error", spec.name, why, fix)


def merge_equal(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that differ in nothing but the node become one, in the place of the first."""
    places: dict[Finding, list[str]] = {}
    for one in findings:
        places.setdefault(replace(one, node=""), []).append(one.node)
    return [replace(one, node=_name(list(dict.fromkeys(nodes)))) for one, nodes in places.items()]


def _name(nodes: list[str]) -> str:
    return nodes[0] if len(nodes) == 1 else f"{nodes[0]} and {len(nodes) - 1} more"


def _load(path: Path) -> ir.Model:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return ir.load(path)
    except (OSError, DecodeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not read as an ONNX model ({reason}); give the path of an .onnx file") from error
