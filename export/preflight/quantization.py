"""The rules of explicit quantisation and of FP16 under strong typing, from `calibration.rules`."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ...calibration.rules import check_rules
from ...calibration.rules_graph import dtype_of
from .findings import Finding
from .subject import Subject

_FP8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)
_INT4 = (ir.DataType.INT4, ir.DataType.UINT4)
# Operators have a check of their own, and a graph of unknown origin states no precision to differ from.
_LEFT_OUT = ("contributed-operator", "other-precision")
_RENAMED = {"float16-norm": "fp16-norm", "float16-softmax": "fp16-softmax"}


def check_quantization(subject: Subject) -> Iterator[Finding]:
    """Every broken rule, as "qdq-<rule>"; "fp16-norm" and "fp16-softmax" for those about FP16."""
    precision = precision_of(subject)
    weight_only = not any(subject.standard("QuantizeLinear"))
    for violation in check_rules(subject.model, precision=precision, weight_only=weight_only):
        if violation.rule in _LEFT_OUT:
            continue
        check = _RENAMED.get(violation.rule, f"qdq-{violation.rule}")
        yield subject.finding(check, violation.severity, violation.node, violation.why, violation.fix)


def precision_of(subject: Subject) -> str:
    """ "fp8", "int8", "int4", "fp16" or "fp32": read off the types of what is dequantised, else of what is computed."""
    types = {dtype_of(node.inputs[0]) for node in subject.standard("DequantizeLinear")}
    if types & set(_FP8):
        return "fp8"
    if types & {ir.DataType.INT8, ir.DataType.UINT8}:
        return "int8"
    if types & set(_INT4):
        return "int4"
    return "fp16" if subject.computes_in_fp16 else "fp32"
