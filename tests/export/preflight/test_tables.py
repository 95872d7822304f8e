"""The tables of data: complete against ONNX itself, every entry with a source."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from tests.export.preflight.plants import OPERATOR_PLANTS, VERSIONS
from tests.export.preflight.plants_values import VALUE_PLANTS

from bridgeport.export.preflight import tables
from bridgeport.runtime.tensorrt.versions import Version

# In the parser's table and no longer in ONNX.
_GONE = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}
_LAST = 25  # the newest opset that any version of the tables takes


def test_operators_are_those_of_onnx() -> None:
    known = {one.name for one in onnx.defs.get_all_schemas() if one.domain == "" and not one.deprecated}
    history = {one.name for one in onnx.defs.get_all_schemas_with_history() if one.domain == ""}
    table = set(tables.operators()["operators"]) | set(tables.operators()["unsupported"])
    assert table - history == _GONE
    old = {
        one.name for one in onnx.defs.get_all_schemas_with_history() if one.domain == "" and one.since_version <= _LAST
    }
    assert sorted((known & old) - table) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_no_operator_is_lost(version: str) -> None:
    """What an older version takes, a later one takes too."""
    now = Version.parse(version)
    names = [name for name in tables.operators()["operators"] if tables.operator_status(name, now) == "accepted"]
    later = Version.parse("11.5")
    assert all(tables.operator_status(name, later) == "accepted" for name in names)
    assert set(names) >= {"Conv", "Gelu", "LayerNormalization", "MatMul", "QuantizeLinear", "Softmax", "Where"}


@pytest.mark.parametrize(
    ("version", "last"),
    [
        ("10.3", 20),
        ("10.5", 20),
        ("10.6", 22),
        ("10.9", 22),
        ("10.13.3", 24),
        ("10.16", 24),
        ("11.4", 24),
        ("11.5", 25),
    ],
)
def test_opsets(version: str, last: int) -> None:
    span = tables.opset_range(Version.parse(version))
    assert (span.first, span.last) == (9, last)
    assert span.source


def test_every_limit_has_source_and_fix() -> None:
    document = tables.limits()
    rules: list[dict[str, Any]] = [
        rule for kind in ("attributes", "outputs", "inputs_absent", "opset_of_operator") for rule in document[kind]
    ]
    assert all(rule["source"] and rule["fix"] for rule in rules)
    assert all(rule["source"] for kind in ("inputs_constant", "ranks") for rule in document[kind])
    named = {
        name for kind in document.values() if isinstance(kind, list) for rule in kind for name in rule["operators"]
    }
    assert named <= set(tables.operators()["operators"])


def test_every_check_is_planted() -> None:
    """But for those of files, versions and contracts, which have tests of their own."""
    planted = {plant.check for plant in (OPERATOR_PLANTS | VALUE_PLANTS).values()}
    assert planted >= {
        "attention-mask", "attribute", "constant", "contrib", "data-dependent", "dtype", "fp16-norm", "fp16-softmax",
        "function", "fused-attention", "if", "input", "loop", "mask", "mixed-types", "operator", "operator-dtype",
        "opset", "output", "qdq-zero-point", "rank", "shape-tensor", "topk",
    }  # fmt: skip
