"""The listings of the genuine Python modules, read: names, signatures, enum members per TensorRT version.

10.16 and 11.4 are whole (introspection of the genuine wheels). 10.3 is 10.16 less what came after 10.3: for the
classes in `tensorrt-api-10.3-vs-11.4.json` member by member, for the rest by `AFTER_10_3`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "listings"
VERSIONS = ("10.3", "10.16", "11.4")
# Classes and enums that serve only members which the 10.3 listing has under "added after 10.3".
AFTER_10_3 = frozenset(
    (
        "IStreamReaderV2",
        "SeekPosition",
        "TimingCacheKey",
        "TimingCacheValue",
        "TilingOptimizationLevel",
        "IRuntimeConfig",
        "EngineStat",
        "IStreamWriter",
        "IAttention",
        "IAttentionBoundaryLayer",
        "IAttentionInputLayer",
        "IAttentionOutputLayer",
        "AttentionNormalizationOp",
        "IRotaryEmbeddingLayer",
        "IKVCacheUpdateLayer",
        "KVCacheMode",
        "IMoELayer",
        "MoEActType",
    )
)
# Names that the binding's own docstrings spell in C++.
ALIASES = {"IParserError": "ParserError"}


@dataclass(frozen=True)
class Parameter:
    """An argument without `self`. `type` is the docstring's text, module names cut off."""

    name: str
    type: str
    required: bool


@dataclass(frozen=True)
class Signature:
    """One overload. `returns` is a bare name where it is a class or an enum of the module."""

    parameters: tuple[Parameter, ...]
    returns: str

    @property
    def names(self) -> list[str]:
        """The arguments in their order."""
        return [parameter.name for parameter in self.parameters]


@dataclass(frozen=True)
class Member:
    """A method with its overloads, a property, or a constant of a class."""

    kind: str
    signatures: tuple[Signature, ...] = ()
    writable: bool = False


@dataclass(frozen=True)
class Listing:
    """One version's module."""

    version: str
    classes: dict[str, dict[str, Member]]
    bases: dict[str, list[str]]
    enums: dict[str, dict[str, int]]
    functions: tuple[str, ...]
    dtype_aliases: dict[str, str]


@cache
def load_listing(version: str) -> Listing:
    """The listing of "10.3", "10.16" or "11.4"; also "11.4.0.106" and the like."""
    version = ".".join(version.split(".")[:2])
    file = "11.4" if version.startswith("11") else "10.16"
    data = json.loads((FOLDER / f"tensorrt-api-{file}.json").read_text())
    later = _after_10_3() if version == "10.3" else {}
    classes = {
        name: {key: _member(value) for key, value in entry["members"].items() if key not in later.get(name, ())}
        for name, entry in data["classes"].items()
        if version != "10.3" or name not in AFTER_10_3
    }
    enums = {
        name: {key: value for key, value in members.items() if key not in later.get(name, ())}
        for name, members in data["enums"].items()
        if version != "10.3" or name not in AFTER_10_3
    }
    aliases = {
        name: value.removeprefix("DataType.")
        for name, value in data["module_values"].items()
        if value.startswith("DataType.") and value.removeprefix("DataType.") in enums["DataType"]
    }
    bases = {name: data["classes"][name]["bases"] for name in classes}
    return Listing(version, classes, bases, enums, tuple(data["functions"]), aliases)


def covered_by_10_3() -> dict[str, set[str]]:
    """Class or enum -> the members that the 10.3 listing itself names; the others are taken from 10.16."""
    data = json.loads((FOLDER / "tensorrt-api-10.3-vs-11.4.json").read_text())
    return {name: {*entry["usable_10.3_to_11.4"], *entry["removed_by_11.4"]} for name, entry in data.items()}


def _after_10_3() -> dict[str, list[str]]:
    data = json.loads((FOLDER / "tensorrt-api-10.3-vs-11.4.json").read_text())
    return {name: entry["added_after_10.3"] for name, entry in data.items()}


def _member(entry: dict[str, Any]) -> Member:
    texts = entry.get("signature", [])
    return Member(entry["kind"], tuple(parse_signature(text) for text in texts), entry.get("writable", False))


def parse_signature(text: str) -> Signature:
    """The signature that pybind11 writes at the top of a docstring."""
    text = re.sub(r"^\d+\. ", "", text)
    head, _, returns = text.rpartition(") -> ")
    arguments = head[head.index("(") + 1 :]
    parameters = []
    for argument in _split(arguments):
        name, _, rest = argument.partition(":")
        kind, default, _ = rest.partition(" = ")
        if name.strip() != "self":
            parameters.append(Parameter(name.strip(), _bare(kind.strip()), not default))
    return Signature(tuple(parameters), _bare(returns))


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += character in "[(<"
        depth -= character in "])>"
        if character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part for part in (*parts, text[start:]) if part.strip()]


def _bare(kind: str) -> str:
    kind = re.sub(r"tensorrt_bindings\.tensorrt\.|nvinfer1::|nvonnxparser::", "", kind)
    return ALIASES.get(kind, kind)
