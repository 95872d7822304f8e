"""numpy's `.npz` archives row by row: np.load unpacks a whole array, which may be larger than memory."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..errors import InputError

_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_SUFFIX = ".npy"
# What the tensors were made with, as SHA-256 in text; see `marks_of`. A file without them is taken as it is.
CHECKPOINT_MARK, PROCESSOR_MARK = "bridgeport/checkpoint", "bridgeport/processor"
MARKS = (CHECKPOINT_MARK, PROCESSOR_MARK)
_MARK_LENGTH = 64


@dataclass(frozen=True)
class Header:
    """What an array's file says about it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class NpzFile:
    """An open archive; `headers` by the names that its arrays were saved under, and `marks`: the hashes in `MARKS`.

    Raises InputError for what is no such archive, is cut off, or holds pickled objects (which are never loaded).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            self._archive = zipfile.ZipFile(path)
        self.headers: dict[str, Header] = {}
        self.marks: dict[str, str] = {}
        try:
            for member in self._archive.namelist():
                with self._errors(), self._archive.open(member) as stream:
                    name = member.removesuffix(_SUFFIX)
                    header = self._read_header(member, stream)
                    if name in MARKS:
                        self.marks[name] = self._read_mark(name, header, stream)
                    else:
                        self.headers[name] = header
        except InputError:
            self._archive.close()
            raise

    def samples(self, *, in_rows: bool) -> Iterator[dict[str, NDArray[Any]]]:
        """With `in_rows` each row `[1, ...]` of all arrays, one at a time; else all arrays whole, once."""
        count = next(iter(self.headers.values())).shape[0] if in_rows else 1
        with ExitStack() as stack:
            streams = {}
            for name in self.headers:
                with self._errors():
                    streams[name] = stack.enter_context(self._archive.open(name + _SUFFIX))
                    self._read_header(name, streams[name])
            for _ in range(count):
                yield {name: self._read(name, streams[name], in_rows=in_rows) for name in self.headers}

    def close(self) -> None:
        """Close the archive."""
        self._archive.close()

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_header(self, name: str, stream: IO[bytes]) -> Header:
        version = npy.read_magic(stream)
        if version not in _READERS:
            raise InputError(f"{self.path}: {name} is of .npy version {version}; accepted are plain arrays of numbers")
        shape, fortran, dtype = _READERS[version](stream)
        if dtype.hasobject or dtype.names is not None:
            raise InputError(
                f"{self.path}: {name} holds pickled objects ({dtype}), which are never loaded; save arrays of numbers"
            )
        if fortran and len(shape) > 1:
            raise InputError(
                f"{self.path}: {name} is in Fortran order, accepted is C order; save np.ascontiguousarray(...) of it"
            )
        return Header(shape, dtype)

    def _read_mark(self, name: str, header: Header, stream: IO[bytes]) -> str:
        if header.shape != () or header.dtype.kind != "U" or header.dtype.itemsize > 4 * _MARK_LENGTH:
            raise InputError(f"{self.path}: {name} is no hash; save the tensors again with `save_stage_inputs`")
        data = stream.read(header.dtype.itemsize)
        try:
            return str(np.frombuffer(data, header.dtype)[0])
        except (ValueError, IndexError) as error:
            raise InputError(f"{self.path}: {name} is cut off; copy the file again") from error

    def _read(self, name: str, stream: IO[bytes], *, in_rows: bool) -> NDArray[Any]:
        header = self.headers[name]
        shape = (1, *header.shape[1:]) if in_rows else header.shape
        size = prod(shape) * header.dtype.itemsize
        with self._errors():
            data = stream.read(size)
        if len(data) < size:
            raise InputError(f"{self.path}: {name} is cut off; copy the file again")
        return np.frombuffer(bytearray(data), header.dtype).reshape(shape)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.strerror is None:
                raise InputError(f"{self.path} is damaged ({error}); copy it again") from error
            raise InputError(f"{self.path} may not be read ({error.strerror}); change its rights") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self.path} is no whole .npz archive ({reason}); save or copy it again") from error
