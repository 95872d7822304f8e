"""Tensors as files that other engines read, written without their libraries: PyTorch's and safetensors'."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

FloatType = Literal["float32", "float16", "bfloat16"]
FLOAT_TYPES: tuple[FloatType, ...] = ("float32", "float16", "bfloat16")
# Name of a type -> (PyTorch's storage class, safetensors' name).
_NAMES = {
    "float32": ("FloatStorage", "F32"),
    "float16": ("HalfStorage", "F16"),
    "bfloat16": ("BFloat16Storage", "BF16"),
    "int32": ("IntStorage", "I32"),
    "int64": ("LongStorage", "I64"),
}
_TORCH_ROOT = "archive"  # any name will do, as long as all entries share it


def cast_floats(values: NDArray[Any], dtype: FloatType) -> NDArray[Any]:
    """`values` as `dtype`; bfloat16, which numpy lacks, as its bits in uint16, rounded to the nearest even.

    Raises InputError for an unknown type, for values that are not finite, and for ones beyond the type's range.
    """
    if dtype not in FLOAT_TYPES:
        raise InputError(f"dtype {dtype!r} is unknown; accepted are {', '.join(FLOAT_TYPES)}")
    if not np.isfinite(values).all():
        raise InputError("the embeddings hold NaN or infinity; check the picture, and the bundle with `parity`")
    if dtype != "bfloat16":
        limit = float(np.finfo(dtype).max)
        if (largest := float(np.abs(values).max(initial=0.0))) > limit:
            raise InputError(f"the embeddings reach {largest:.3g}, beyond {dtype} ({limit:.3g}); use bfloat16")
        return np.ascontiguousarray(values, dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def torch_file(values: NDArray[Any], dtype: str | None = None) -> bytes:
    """What `torch.save` writes for one contiguous tensor on the CPU (zip format, PyTorch 1.6 and later).

    `dtype`: "bfloat16" for bits in uint16 (see `cast_floats`); else the array's own. `torch.load` reads it with
    `weights_only=True`: the pickle names nothing but the tensor's constructor.
    """
    name = dtype or str(values.dtype)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{_TORCH_ROOT}/data.pkl", _tensor_pickle(_NAMES[name][0], values.shape))
        archive.writestr(f"{_TORCH_ROOT}/byteorder", b"little")
        archive.writestr(f"{_TORCH_ROOT}/data/0", np.ascontiguousarray(values).tobytes())
        archive.writestr(f"{_TORCH_ROOT}/version", b"3\n")
    return buffer.getvalue()


def safetensors_file(tensors: Mapping[str, tuple[NDArray[Any], str]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file (huggingface/safetensors, format description) of name -> (values, name of their type)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    data = b""
    for key, (values, dtype) in tensors.items():
        raw = np.ascontiguousarray(values).tobytes()
        span = [len(data), len(data) + len(raw)]
        header[key] = {"dtype": _NAMES[dtype][1], "shape": list(values.shape), "data_offsets": span}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _tensor_pickle(storage: str, shape: tuple[int, ...]) -> bytes:
    """Pickle (protocol 2) of `torch._utils._rebuild_tensor_v2(storage 0, offset 0, shape, strides, False, {})`."""
    count = int(np.prod(shape, dtype=np.int64))
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    return b"".join(
        [
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((",
            *(_text("storage"), b"ctorch\n" + storage.encode() + b"\n", _text("0"), _text("cpu"), _integer(count)),
            b"tQ",  # the tuple is the storage's persistent id
            *(_integer(0), _tuple(shape), _tuple(strides)),
            b"\x89ccollections\nOrderedDict\n)RtR.",  # no gradient; no hooks
        ]
    )


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)  # LONG1 of 8 bytes


def _tuple(values: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(_integer(value) for value in values) + b"t"
