"""Which external files an ONNX graph points to, read from the protobuf wire format without any ONNX parser.

A bundle is checked before a parser opens it, so the check cannot use one. Field numbers are those of onnx.proto3:
ModelProto.graph 7, .training_info 20 and .functions 25; TrainingInfoProto.initialization 1 and .algorithm 2;
GraphProto.node 1, .initializer 5 and .sparse_initializer 15; FunctionProto.node 7; NodeProto.attribute 5;
AttributeProto.t 5, .g 6, .tensors 10, .graphs 11, .sparse_tensor 22 and .sparse_tensors 23;
SparseTensorProto.values 1 and .indices 2; TensorProto.external_data 13; StringStringEntryProto.key 1, .value 2.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

# message -> {field number: message that it holds}
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}
_MAX_DEPTH = 32


def external_data_locations(path: Path) -> set[str]:
    """Every `location` of external data in the ONNX file at `path`.

    Raises ValueError when the file is not a well-formed protobuf message or nests deeper than 32 graphs.
    """
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return set(_locations(data, 0, len(data), "Model", 0))


def _locations(data: mmap.mmap, start: int, end: int, message: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH * 4:
        raise ValueError("graphs are nested too deeply")
    for field, begin, stop in _length_delimited(data, start, end):
        if message == "Tensor" and field == 13:
            entry = {f: data[b:s] for f, b, s in _length_delimited(data, begin, stop)}
            if entry.get(1) == b"location":
                yield entry.get(2, b"").decode("utf-8")
        elif field in (children := _CHILDREN.get(message, {})):
            yield from _locations(data, begin, stop, children[field], depth + 1)


def _length_delimited(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, first byte, byte after the last) of each length-delimited field between `start` and `end`."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        field, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            _, position = _varint(data, position, end)
        elif wire_type == 1:
            position += 8
        elif wire_type == 5:
            position += 4
        elif wire_type == 2:
            length, position = _varint(data, position, end)
            if position + length > end:
                raise ValueError("a field is longer than the message that holds it")
            yield field, position, position + length
            position += length
        else:
            raise ValueError(f"unknown protobuf wire type {wire_type}")
    if position != end:
        raise ValueError("the last field is cut off")


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number is cut off or too long")


def opset_imports(path: Path) -> set[str]:
    """Domains of the operator sets that the ONNX file at `path` imports; "" is ai.onnx.

    Raises ValueError when the file is not a well-formed protobuf message.
    """
    # ModelProto.opset_import 8, OperatorSetIdProto.domain 1.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        domains = set()
        for field, begin, stop in _length_delimited(data, 0, len(data)):
            if field == 8:
                entry = {f: data[b:s] for f, b, s in _length_delimited(data, begin, stop)}
                domains.add(entry.get(1, b"").decode("utf-8"))
        return domains
