"""The tables of `data/`: what the ONNX parser of each TensorRT version takes, with the source of every entry.

`operators.json`: opset ranges, operators with the types of their first input, operators without an importer.
`limits.json`: attributes, outputs, inputs and ranks that importers refuse. What no source tells is "unverified"
there, and gives a warning and never an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ...errors import InputError
from ...runtime.tensorrt.versions import OLDEST, Version

_DATA = Path(__file__).parent / "data"

Status = Literal["accepted", "too old", "unsupported", "unknown"]


@dataclass(frozen=True)
class OpsetRange:
    """Opsets `first` to `last` are stated for a version, up to `unverified_last` by a source that another contradicts.

    `last_with_4_bit`: for graphs with INT4, a type that the version takes and that ONNX has from opset 21 only.
    """

    first: int
    last: int
    last_with_4_bit: int
    unverified_last: int
    source: str


@cache
def operators() -> dict[str, Any]:
    """`operators.json`."""
    return _read("operators.json")


@cache
def limits() -> dict[str, Any]:
    """`limits.json`."""
    return _read("limits.json")


def check_version(version: Version) -> None:
    """InputError for a version older than the tables."""
    if version < Version.parse(OLDEST):
        raise InputError(
            f"TensorRT {version} is older than {OLDEST}, the oldest that preflight knows; give {OLDEST} or later"
        )


def is_beyond(version: Version) -> bool:
    """Whether `version` is newer than all that the tables know."""
    known = Version.parse(str(operators()["known_until"]))
    return (version.major, version.minor) > (known.major, known.minor)


def opset_range(version: Version) -> OpsetRange:
    """The opsets of the standard domain that the parser of `version` takes."""
    rows = [row for row in operators()["opsets"] if version >= Version.parse(row["from"])]
    row = rows[-1]
    return OpsetRange(row["min"], row["max"], row["max_with_4_bit"], row["unverified_max"], row["source"])


def operator_status(op_type: str, version: Version) -> Status:
    """Whether the parser of `version` has an importer for an operator of the standard domain."""
    entry = operators()["operators"].get(op_type)
    if entry is None:
        return "unsupported" if op_type in operators()["unsupported"] else "unknown"
    return "accepted" if version >= Version.parse(entry.get("first", "10.0")) else "too old"


def first_version(op_type: str) -> str:
    """The version that has the operator first; "10.0" for what older ones have too."""
    return str(operators()["operators"][op_type].get("first", "10.0"))


def operator_types(op_type: str, version: Version) -> frozenset[str]:
    """Element types (ONNX names) that the operator's data may have; empty for an operator that is not in the table."""
    entry = operators()["operators"].get(op_type)
    if entry is None:
        return frozenset()
    name = entry["types"]
    for until, other in entry.get("types_before", {}).items():
        if version < Version.parse(until):
            name = other
    return frozenset(operators()["type_sets"][name])


def custom_operator(domain: str, op_type: str) -> str | None:
    """The version that has TensorRT's own operator first, None for any other operator."""
    table = operators()["custom_operators"]
    first = table["first"].get(op_type) if domain in table["domains"] else None
    return None if first is None else str(first)


def applies(rule: dict[str, Any], version: Version) -> bool:
    """Whether a limit holds for `version`: those with "until" end there."""
    return "until" not in rule or version < Version.parse(rule["until"])


def _read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((_DATA / name).read_text(encoding="utf-8"))
    return document
