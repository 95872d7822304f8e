"""What the double writes as a plan and as a timing cache: a magic, JSON, and for a plan the ONNX model.

The model travels in the plan with its external data, so a plan works wherever it is copied to, as a real one does.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import onnx

PLAN_MAGIC = b"BRIDGEPORT-DOUBLE-PLAN\n"
CACHE_MAGIC = b"BRIDGEPORT-DOUBLE-CACHE\n"


@dataclass
class Plan:
    """`header`: version, sm, flags, profiles, inputs, ... as JSON; `model`: the serialised ONNX model."""

    header: dict[str, Any]
    model: bytes

    def to_bytes(self) -> bytes:
        """The plan file."""
        header = {**self.header, "onnx_sha256": hashlib.sha256(self.model).hexdigest()}
        text = json.dumps(header).encode()
        return PLAN_MAGIC + len(text).to_bytes(8, "little") + text + self.model

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """ValueError, with TensorRT's words, for what the double did not write or what was changed."""
        if not data.startswith(PLAN_MAGIC):
            raise ValueError("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magic tag does not match)")
        start = len(PLAN_MAGIC) + 8
        size = int.from_bytes(data[len(PLAN_MAGIC) : start], "little")
        try:
            header = json.loads(data[start : start + size])
        except ValueError:
            raise ValueError("Error Code 1: Serialization (header cannot be read)") from None
        model = data[start + size :]
        if hashlib.sha256(model).hexdigest() != header["onnx_sha256"]:
            raise ValueError("Error Code 1: Serialization (assertion stdArchiveReader size failed)")
        return cls(header, model)


def strip_weights(model: onnx.ModelProto) -> list[str]:
    """Take the data of every floating-point initialiser away; their names."""
    names = []
    for tensor in model.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
            tensor.ClearField("int32_data")
            names.append(tensor.name)
    return names


def weights_size(model: onnx.ModelProto) -> int:
    """Bytes of the floating-point initialisers."""
    sizes = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2}
    total = 0
    for tensor in model.graph.initializer:
        count = 1
        for dim in tensor.dims:
            count *= dim
        total += count * sizes.get(tensor.data_type, 0)
    return total


def write_cache(content: dict[str, Any]) -> bytes:
    """A timing cache: version, sm and the tactics by key."""
    return CACHE_MAGIC + json.dumps(content, sort_keys=True).encode()


def read_cache(data: bytes) -> dict[str, Any] | None:
    """None for what is no timing cache."""
    if not data.startswith(CACHE_MAGIC):
        return None
    try:
        content: dict[str, Any] = json.loads(data[len(CACHE_MAGIC) :])
    except ValueError:
        return None
    return content


def inputs_of(model: Any) -> list[Any]:
    """Graph inputs that are no initialisers."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def shape_of(value: Any) -> tuple[int, ...]:
    """-1 for an axis without a fixed size."""
    return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim)


def named_dims(io: Any, shapes: Any) -> list[tuple[str, str, int]]:
    """(input, name of an axis, its size) of the shapes that are set."""
    found = []
    for name, shape in shapes.items():
        dims = io[name].type.tensor_type.shape.dim
        found += [(name, dim.dim_param, size) for dim, size in zip(dims, shape, strict=True) if dim.dim_param]
    return found
