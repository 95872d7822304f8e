"""Element types that TensorRT has, and that the importer of each operator takes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from ...calibration.rules_graph import dtype_of, name_of
from ...runtime.tensorrt.versions import Version
from . import tables
from .findings import Finding
from .subject import STANDARD, Subject, schema_of

# Which input has the data whose type the parser's list is about; the first where nothing else is said.
_DATA_INPUT = {"OneHot": 2, "Where": 1}
# Types of these are checked by the rules of Q/DQ, or there is no data.
_SKIPPED = ("QuantizeLinear", "DequantizeLinear", "If", "Loop", "Scan", "Constant")
_UINT8_READERS = ("Cast", "CastLike", "QuantizeLinear", "DequantizeLinear")


def check_types(subject: Subject) -> Iterator[Finding]:
    """Types that TensorRT does not have, or not inside of an engine."""
    table = tables.limits()["dtypes"]
    for name, dtype in _typed_values(subject):
        if dtype.name in table["cast_down"]:
            lower = table["cast_down"][dtype.name]
            why = f"{dtype.name}: the parser casts it down to {lower}, numbers beyond that are clamped"
            yield subject.finding("dtype", "warning", name, why, f"export in {lower}", fixable=True)
        elif dtype.name not in table["accepted"]:
            why = f"{dtype.name}: TensorRT has no such type"
            yield subject.finding("dtype", "error", name, why, _advice(dtype))
        elif subject.version < Version.parse(table["accepted"][dtype.name]):
            why = f"{dtype.name}: TensorRT has this type from {table['accepted'][dtype.name]} on"
            yield subject.finding("dtype", "error", name, why, "quantise to INT8, or use a later TensorRT")


def check_uint8(subject: Subject) -> Iterator[Finding]:
    """UINT8 comes in and goes out, and is cast on the way: no operator computes with it."""
    for node in subject.nodes:
        if node.domain not in STANDARD or node.op_type in _UINT8_READERS:
            continue
        if any(dtype_of(value) == ir.DataType.UINT8 for value in node.inputs if value is not None):
            why = f"{node.op_type} computes with UINT8, which is a type of inputs and outputs only"
            fix = "cast to a float or INT32 right behind the input"
            yield subject.finding("dtype", "error", name_of(node), why, fix)


def check_operator_types(subject: Subject) -> Iterator[Finding]:
    """An operator's data has a type of the parser's list. A warning: importers are known to take more than it says."""
    hard = tables.limits()["dtypes"]
    for node in subject.nodes:
        if node.domain not in STANDARD or node.op_type in _SKIPPED:
            continue
        if tables.operator_status(node.op_type, subject.version) != "accepted":
            continue
        dtype = _data_type(node)
        if dtype is None or dtype.name not in hard["accepted"] or dtype == ir.DataType.UINT8:
            continue
        accepted = tables.operator_types(node.op_type, subject.version)
        if dtype.name not in accepted:
            why = f"{node.op_type} of {dtype.name}: operators.md lists {', '.join(sorted(accepted))} (unverified)"
            fix = f"if the build stops there, cast to {_nearest(dtype, accepted)} before it and back behind"
            whole = node.op_type == "Clip" and dtype in (ir.DataType.INT64, ir.DataType.INT32)
            yield subject.finding("operator-dtype", "warning", name_of(node), why, fix, fixable=whole)


def check_mixed_types(subject: Subject) -> Iterator[Finding]:
    """Inputs that ONNX binds to one type have one type; a strongly typed network converts nothing by itself."""
    for node in subject.nodes:
        schema = schema_of(node, subject.opset)
        if schema is None:
            continue
        bound: dict[str, list[str]] = {}
        for index, value in enumerate(node.inputs):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            dtype = dtype_of(value)
            if dtype is not None and dtype != ir.DataType.UNDEFINED and _is_homogeneous(formal):
                bound.setdefault(formal.type_str, []).append(dtype.name)
        for parameter, names in bound.items():
            if parameter in {one.type_param_str for one in schema.type_constraints} and len(set(names)) > 1:
                mixed = " and ".join(sorted(set(names)))
                why = f"{node.op_type} mixes {mixed}, and a strongly typed network converts nothing"
                fix = "cast to one type before it; torch.onnx.export(dynamo=False) writes such graphs of half() models"
                yield subject.finding("mixed-types", "error", name_of(node), why, fix)


def _is_homogeneous(formal: onnx.defs.OpSchema.FormalParameter) -> bool:
    variadic = formal.option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    return formal.is_homogeneous or not variadic


def _typed_values(subject: Subject) -> Iterator[tuple[str, ir.DataType]]:
    """Names and types of all values, graph inputs and constants included; once each."""
    for graph in subject.model.graphs():
        values = [*graph.inputs, *graph.initializers.values()]
        values += [output for node in graph for output in node.outputs]
        for value in values:
            dtype = dtype_of(value)
            if dtype is not None and dtype != ir.DataType.UNDEFINED:
                yield value.name or "?", dtype


def _data_type(node: ir.Node) -> ir.DataType | None:
    if node.op_type in ("ConstantOfShape", "Range") or not node.inputs:
        return dtype_of(node.outputs[0])
    index = _DATA_INPUT.get(node.op_type, 0)
    return dtype_of(node.inputs[index]) if index < len(node.inputs) else None


def _nearest(dtype: ir.DataType, accepted: frozenset[str]) -> str:
    if dtype == ir.DataType.BOOL and "INT32" in accepted:
        return "INT32"
    return "FLOAT" if "FLOAT" in accepted else sorted(accepted)[0]


def _advice(dtype: ir.DataType) -> str:
    if dtype == ir.DataType.STRING:
        return "do it before the graph: engines have no strings"
    if dtype.name.startswith("COMPLEX"):
        return "write real and imaginary parts as two tensors"
    if dtype.name.startswith("FLOAT8"):
        return "use FLOAT8E4M3FN"
    return "cast to INT32 or INT64 when exporting"
