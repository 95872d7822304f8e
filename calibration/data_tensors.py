"""Stage inputs from files: numpy's `.npz` and what `polygraphy run --save-inputs` writes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import InputError
from ..models.contract import StageContract
from .data_npz import NpzFile
from .data_polygraphy import read_polygraphy_inputs
from .data_save import check_marks
from .data_types import CalibrationData, Sample, Unit, check_minimum, seeded_order

SUFFIXES = (".npz", ".json")
Contracts = Mapping[str, StageContract]
Tensors = dict[str, dict[str, NDArray[Any]]]


@dataclass(frozen=True)
class TensorUnit(Unit):
    """The `index`-th sample of the file `path`."""

    path: Path
    index: int


@dataclass(frozen=True)
class TensorData(CalibrationData):
    """Stage inputs; those of one file follow each other, so that it is read once, from its start."""

    units: tuple[TensorUnit, ...] = field(default=())
    contracts: Contracts = field(default_factory=dict)

    def samples(self) -> Iterator[Sample]:
        places = {path: place for place, path in reversed(list(enumerate(unit.path for unit in self.units)))}
        ordered = sorted(self.units, key=lambda unit: (places[unit.path], unit.index))
        for path, units in groupby(ordered, key=lambda unit: unit.path):
            wanted = [unit.index for unit in units]
            for index, tensors in enumerate(read_tensors(path, self.contracts)):
                if index in wanted:
                    yield Sample(None, tensors=tensors)
                if index == wanted[-1]:
                    break


def tensor_files(path: Path) -> list[Path]:
    """`path` itself, or the files in that directory, that may hold tensors, by their names."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]


def open_tensors(
    path: Path, files: Sequence[Path], bundle: Bundle | None, *, seed: int, limit: int | None, minimum: int
) -> TensorData:
    """The samples of `files`, each value of them checked against the stages of `bundle`.

    A tensor is named `stage/input` ("encoder/pixel_values"); in a file with the inputs of one stage alone, `input`
    will do. In a `.npz` file the leading axis counts samples where every input's leading axis is the stage's batch;
    any other file is one sample. In Polygraphy's JSON each iteration is one. Equal samples count as one.

    Raises InputError for wrong names, shapes and types, NaN and infinity, pickled objects and damaged files.
    """
    if bundle is None:
        raise InputError(f"{path} holds tensors, which are checked against a bundle; name that too")
    contracts = {stage.contract.name: stage.contract for stage in bundle.manifest.stages}
    found: dict[str, TensorUnit] = {}
    for file in files:
        check_marks(file, bundle)
        for index, tensors in enumerate(read_tensors(file, contracts)):
            digest = _digest(tensors)
            found.setdefault(digest, TensorUnit(digest, 1, file, index))
    units = seeded_order(found, seed)[:limit]
    check_minimum(len(units), minimum, str(path), "different samples of tensors")
    return TensorData(str(path), seed, tuple(units), contracts)


def _digest(tensors: Tensors) -> str:
    """SHA-256 over one sample, so that equal ones count once and never stand on both sides of a split."""
    digest = hashlib.sha256()
    for stage, arrays in sorted(tensors.items()):
        for name, array in sorted(arrays.items()):
            digest.update(f"{stage}/{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def read_tensors(path: Path, contracts: Contracts) -> Iterator[Tensors]:
    """The samples of one file, one at a time, checked: stage -> input -> array."""
    if path.suffix.lower() == ".npz":
        yield from _read_npz(path, contracts)
        return
    for index, feed in enumerate(read_polygraphy_inputs(path)):
        where = f"{path}, iteration {index}"
        places = assign_names(where, list(feed), contracts)
        yield _checked(where, {places[name]: array for name, array in feed.items()}, contracts)


def _read_npz(path: Path, contracts: Contracts) -> Iterator[Tensors]:
    with NpzFile(path) as archive:
        places = assign_names(str(path), list(archive.headers), contracts)
        specs = {name: contracts[stage].input(tensor) for name, (stage, tensor) in places.items()}
        for name, spec in specs.items():
            _check_type(f"{path}: {name}", archive.headers[name].dtype, spec.dtype)
        shapes = {name: archive.headers[name].shape for name in specs}
        batched = all(spec.shape[:1] == ("batch",) and shapes[name] for name, spec in specs.items())
        in_rows = batched and len({shape[0] for shape in shapes.values()}) == 1
        one = {places[name]: (1, *shape[1:]) if in_rows else shape for name, shape in shapes.items()}
        _check_shapes(str(path), one, contracts)
        for index, arrays in enumerate(archive.samples(in_rows=in_rows)):
            where = f"{path}, sample {index}" if in_rows else str(path)
            yield _checked(where, {places[name]: array for name, array in arrays.items()}, contracts)


def assign_names(where: str, names: Sequence[str], contracts: Contracts) -> dict[str, tuple[str, str]]:
    """Name in the file -> (stage, input). Each stage must have all of its inputs.

    Raises InputError for names that are no stage's, and for bare names that are those of several.
    """
    if not any("/" in name for name in names):
        fitting = [stage for stage, contract in contracts.items() if _input_names(contract) == set(names)]
        if len(fitting) == 1:
            return {name: (fitting[0], name) for name in names}
        if fitting:
            which = " and ".join(fitting)
            example = f"{fitting[0]}/{names[0]}"
            raise InputError(f"{where}: {', '.join(names)} are inputs of {which}; name the stage too ({example})")
    places = dict(zip(names, (_place(name) for name in names), strict=True))
    given = {stage: {tensor for other, tensor in places.values() if other == stage} for stage, _ in places.values()}
    for stage, tensors in given.items():
        if stage not in contracts or tensors != _input_names(contracts[stage]):
            accepted = "; ".join(f"{name}: {', '.join(sorted(_input_names(one)))}" for name, one in contracts.items())
            raise InputError(
                f"{where} holds {', '.join(names) or 'nothing'}; accepted are all inputs of a stage, as `stage/input` "
                f"or `input` ({accepted})"
            )
    if not places:
        raise InputError(f"{where} holds no tensor; save the inputs of a stage")
    return places


def _place(name: str) -> tuple[str, str]:
    stage, _, tensor = name.rpartition("/")
    return stage, tensor


def _input_names(contract: StageContract) -> set[str]:
    return {spec.name for spec in contract.inputs}


def _checked(where: str, arrays: Mapping[tuple[str, str], NDArray[Any]], contracts: Contracts) -> Tensors:
    _check_shapes(where, {place: array.shape for place, array in arrays.items()}, contracts)
    tensors: Tensors = {}
    for (stage, name), array in arrays.items():
        _check_type(f"{where}: {stage}/{name}", array.dtype, contracts[stage].input(name).dtype)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int(array.size - np.isfinite(array).sum())
            raise InputError(
                f"{where}: {stage}/{name} has {bad} values of {array.size} that are NaN or infinite; calibration needs "
                "finite ones: remove the sample"
            )
        tensors.setdefault(stage, {})[name] = np.ascontiguousarray(array)
    return tensors


def _check_type(what: str, came: np.dtype[Any], accepted: str) -> None:
    if came != np.dtype(accepted):
        raise InputError(f"{what} is {came}, accepted is {accepted}; convert it")


def _check_shapes(where: str, shapes: Mapping[tuple[str, str], tuple[int, ...]], contracts: Contracts) -> None:
    for stage in {stage: None for stage, _ in shapes}:
        mine = {name: shape for (other, name), shape in shapes.items() if other == stage}
        try:
            contracts[stage].bind_axes(mine)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
