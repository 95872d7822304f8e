"""Operators, opsets, attributes, inputs and outputs that the parser of a version takes; the facts are in `tables`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...calibration.placement.patterns import is_constant, origin
from ...calibration.rules_graph import dtype_of, name_of, rank_of
from . import tables
from .findings import Finding, Severity
from .subject import STANDARD, Subject, schema_of

_FOUR_BIT = (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT4E2M1)
_MICROSOFT = "com.microsoft"


def check_opset(subject: Subject) -> Iterator[Finding]:
    """The opset of the standard domain is one that the version's parser states."""
    if tables.is_beyond(subject.version):
        why = f"TensorRT {subject.version} is newer than the tables, which end at {tables.operators()['known_until']}"
        fix = "read its operators.md for what was removed"
        yield subject.finding("version", "note", subject.path.name, why, fix)
    span = tables.opset_range(subject.version)
    opset = subject.opset
    if not opset:
        return
    last = span.last_with_4_bit if _has_four_bit(subject) else span.last
    stated = f"the parser of TensorRT {subject.version} takes {span.first} to {last}"
    if span.first <= opset <= last:
        return
    fix = f"export at opset {last} or lower"
    if last < opset <= span.unverified_last:
        why = f"opset {opset}: {stated} for certain; NVIDIA's documents contradict each other for {opset} (unverified)"
        yield subject.finding("opset", "warning", subject.path.name, why, fix)
    elif opset > last and tables.is_beyond(subject.version):
        why = f"opset {opset}: {stated} as far as it is known (unverified)"
        yield subject.finding("opset", "warning", subject.path.name, why, fix)
    else:
        if opset < span.first:
            fix = f"convert the graph to opset {span.first} or later (onnx.version_converter)"
        yield subject.finding("opset", "error", subject.path.name, f"opset {opset}: {stated}", fix)


def check_functions(path: Path, model: ir.Model, stage: str) -> Iterator[Finding]:
    """Model-local functions, before they are inlined: they are imported, but a call must give every input."""
    fix = "inline the functions (onnx.inliner)"
    for node in model.graph.all_nodes():
        function = model.functions.get(node.op_identifier())
        if function is not None and len(node.inputs) != len(function.inputs):
            why = (
                f"it calls the local function {node.op_type} with {len(node.inputs)} inputs, and that has "
                f"{len(function.inputs)}: the parser refuses a call that leaves inputs out"
            )
            yield Finding("function", "error", stage, name_of(node), why, fix, fixable=True)
    if model.functions:
        names = ", ".join(sorted({function.name for function in model.functions.values()}))
        why = f"local functions ({names}): a plugin of the same name would be taken instead of the function"
        yield Finding("function", "note", stage, path.name, why, fix, fixable=True)


def check_validity(subject: Subject) -> Iterator[Finding]:
    """Nodes have the inputs and attributes that ONNX requires; nothing else can be asked of a graph where not."""
    for node in subject.nodes:
        schema = schema_of(node, subject.opset)
        if schema is None:
            continue
        given = sum(value is not None for value in node.inputs)
        needed = [name for name, one in schema.attributes.items() if one.required and name not in node.attributes]
        fix = "export again; onnx.checker.check_model tells more"
        if len(node.inputs) < schema.min_input or (given == 0 and schema.min_input):
            why = f"{node.op_type} with {given} inputs: ONNX wants {schema.min_input}, so this is no valid graph"
            yield subject.finding("invalid", "error", name_of(node), why, fix)
        elif needed:
            why = f"{node.op_type} without {', '.join(needed)}, which ONNX requires: this is no valid graph"
            yield subject.finding("invalid", "error", name_of(node), why, fix)


def check_operators(subject: Subject) -> Iterator[Finding]:
    """Every operator has an importer."""
    for node in subject.nodes:
        first = tables.custom_operator(node.domain, node.op_type)
        if first is not None:
            yield from _check_custom(subject, node, first)
        elif node.domain in STANDARD:
            yield from _check_standard(subject, node)
        else:
            yield _contributed(subject, node)


def check_attributes(subject: Subject) -> Iterator[Finding]:
    """Attributes have values that importers take."""
    for rule in tables.limits()["attributes"]:
        for node in subject.standard(*rule["operators"]):
            attribute = node.attributes.get(rule["attribute"])
            if attribute is None:
                continue
            given = list(attribute.value) if isinstance(attribute.value, tuple | list) else [attribute.value]
            wrong = [one for one in given if one not in rule["accepted"]]
            if not wrong and rule["accepted"]:
                continue
            text = f"{node.op_type} with {rule['attribute']}={_text(attribute.value)}"
            accepted = ", ".join(_text(one) for one in rule["accepted"]) or "nothing"
            unverified = bool(wrong) and all(one in rule.get("unverified", []) for one in wrong)
            severity: Severity = "warning" if unverified else rule["severity"]
            doubt = " (unverified: NVIDIA's sources contradict each other)" if unverified else ""
            why = f"{text}: the parser takes {accepted} there{doubt}"
            yield subject.finding("attribute", severity, name_of(node), why, rule["fix"])


def check_interfaces(subject: Subject) -> Iterator[Finding]:
    """Outputs, inputs, ranks and opset-bound forms that importers refuse."""
    limits = tables.limits()
    for rule in limits["outputs"]:
        for node in subject.standard(*rule["operators"]):
            yield from _check_outputs(subject, node, rule)
    for rule in limits["inputs_absent"]:
        for node in subject.standard(*rule["operators"]):
            for index, name in rule["inputs"].items():
                if _input(node, index) is not None:
                    why = f"{node.op_type} with the input {name}: the parser takes none there"
                    yield subject.finding("input", "error", name_of(node), why, rule["fix"])
    for rule in limits["inputs_constant"]:
        for node in subject.standard(*rule["operators"]):
            yield from _check_constant(subject, node, rule)
    for rule in limits["ranks"]:
        if tables.applies(rule, subject.version):
            yield from _check_ranks(subject, rule)
    for rule in limits["opset_of_operator"]:
        if tables.applies(rule, subject.version) and subject.opset >= rule["opset"]:
            for node in subject.standard(*rule["operators"]):
                why = f"{node.op_type} of opset {rule['opset']} or later: the parser reads it from {rule['until']} on"
                yield subject.finding("operator", rule["severity"], name_of(node), why, rule["fix"])


def _check_custom(subject: Subject, node: ir.Node, first: str) -> Iterator[Finding]:
    if subject.version < type(subject.version).parse(first):
        why = f"{node.op_type} is TensorRT's own operator from {first} on"
        yield subject.finding(
            "operator", "error", name_of(node), why, f"use TensorRT {first} or later, or export without it"
        )


def _check_standard(subject: Subject, node: ir.Node) -> Iterator[Finding]:
    status = tables.operator_status(node.op_type, subject.version)
    if status == "accepted":
        return
    name = name_of(node)
    if status == "too old":
        first = tables.first_version(node.op_type)
        why = f"{node.op_type} is imported from TensorRT {first} on"
        fix = f"use TensorRT {first} or later, or export at opset 20, which writes it out"
        yield subject.finding("operator", "error", name, why, fix)
    elif status == "unsupported":
        why = f"{node.op_type} has no importer in any version up to {tables.operators()['known_until']}"
        yield subject.finding("operator", "error", name, why, _advice(node.op_type))
    elif tables.is_beyond(subject.version):
        why = f"{node.op_type} is in no table (unverified)"
        yield subject.finding("operator", "warning", name, why, "look for it in operators.md of this version")
    else:
        why = f"{node.op_type} is not in the parser's list of operators"
        fix = "export at opset 20 or lower, which writes it out in older operators"
        if node.op_type == "SimplifiedLayerNormalization":
            fix = "quantise or export the bundle with --target tensorrt, which rewrites the decoder"
        yield subject.finding("operator", "error", name, why, fix)


def _contributed(subject: Subject, node: ir.Node) -> Finding:
    why = f"{node.domain}.{node.op_type}: the parser imports operators of ai.onnx only, unless a plugin has this name"
    fix = "export without it, or register a plugin"
    if node.domain == _MICROSOFT:
        fix = (
            "a decoder of Bridgeport: quantise the bundle with --target tensorrt, which rewrites it; any other graph: "
            "export it without onnxruntime's graph optimiser"
        )
    return subject.finding("contrib", "error", name_of(node), why, fix)


def _advice(op_type: str) -> str:
    if op_type in ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul"):
        return "quantise with QuantizeLinear and DequantizeLinear for tensorrt"
    if op_type.startswith(("Sequence", "Optional")) or op_type in ("SplitToSequence", "ConcatFromSequence"):
        return "export without sequences and optionals (tensors in, tuple of tensors out)"
    if op_type.startswith("String") or op_type in ("RegexFullMatch", "TfIdfVectorizer"):
        return "do it before the graph: engines have no strings"
    return "write it with other operators, or register a plugin"


def _check_outputs(subject: Subject, node: ir.Node, rule: dict[str, Any]) -> Iterator[Finding]:
    if any(value.name for value in node.outputs[rule["most"] :]):
        why = f"{node.op_type} with {len(node.outputs)} outputs: the parser takes {rule['most']}"
        yield subject.finding("output", "error", name_of(node), why, rule["fix"])


def _check_constant(subject: Subject, node: ir.Node, rule: dict[str, Any]) -> Iterator[Finding]:
    for index, name in rule["inputs"].items():
        value = _input(node, index)
        if value is not None and not is_constant(origin(value)):
            why = f"{node.op_type} with {name} computed at run time: the parser wants a constant"
            fix = "fold constants (polygraphy surgeon sanitize --fold-constants), or export with a fixed value"
            yield subject.finding("input", "error", name_of(node), why, fix)


def _check_ranks(subject: Subject, rule: dict[str, Any]) -> Iterator[Finding]:
    for node in subject.standard(*rule["operators"]):
        for index, name in rule["inputs"].items():
            rank = rank_of(_input(node, index))
            if rank is not None and rank not in rule["ranks"]:
                accepted = " or ".join(str(one) for one in rule["ranks"])
                why = f"{node.op_type} with {name} of rank {rank}: the parser takes rank {accepted}"
                yield subject.finding("rank", rule["severity"], name_of(node), why, "reshape before and after it")


def _has_four_bit(subject: Subject) -> bool:
    return any(dtype_of(_input(node, "0")) in _FOUR_BIT for node in subject.standard("DequantizeLinear"))


def _input(node: ir.Node, index: str) -> ir.Value | None:
    place = int(index)
    return node.inputs[place] if place < len(node.inputs) else None


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
