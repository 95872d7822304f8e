"""Several graphs of one network over one file of weights: what is the same in two of them lies on the disk once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from ..errors import ExportError

# Type, shape and SHA-256 of the bytes: what makes two weights one, whatever they are called.
_Key = tuple[str, tuple[int, ...], str]


def share_weights(graphs: Mapping[Path, Path]) -> None:
    """Move graphs (old path -> new path, all new ones in one folder) and put their weights into one file there.

    That file is named after the first new path; the old graphs and files of weights are removed. Raises ExportError
    when a graph does not read back the weights that it had.
    """
    first = next(iter(graphs.values()))
    models = {new: ir.load(old) for old, new in graphs.items()}
    keys = {new: {value: _key(tensor) for value, tensor in _external(model).items()} for new, model in models.items()}
    unique: dict[_Key, ir.ExternalTensor] = {}
    for new, model in models.items():
        for value, tensor in _external(model).items():
            unique.setdefault(keys[new][value], tensor)
    first.parent.mkdir(parents=True, exist_ok=True)
    # Written aside, as the file of that name may be one that is still read.
    aside = f".{first.name}.data"
    written = ir.external_data.convert_tensors_to_external(list(unique.values()), first.parent, aside)
    places = dict(zip(unique, written, strict=True))
    for new, model in models.items():
        for value, key in keys[new].items():
            model.graph.initializers[value].const_value = _place(places[key], value, first)
    for old in graphs:
        _remove(old)
    (first.parent / aside).rename(f"{first}.data")
    for new, model in models.items():
        ir.save(model, new)
        _check(new, keys[new])


def _external(model: ir.Model) -> dict[str, ir.ExternalTensor]:
    tensors = ((name, value.const_value) for name, value in model.graph.initializers.items())
    return {name: tensor for name, tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def _key(tensor: ir.ExternalTensor) -> _Key:
    return str(tensor.dtype), tuple(tensor.shape.numpy()), hashlib.sha256(tensor.tobytes()).hexdigest()


def _place(tensor: ir.ExternalTensor, name: str, graph: Path) -> ir.ExternalTensor:
    """`tensor` under `name`, in the file of weights of `graph`."""
    return ir.ExternalTensor(
        f"{graph.name}.data",
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=name,
        base_dir=graph.parent,
    )


def _remove(old: Path) -> None:
    old.unlink()
    Path(f"{old}.data").unlink(missing_ok=True)
    if not any(old.parent.iterdir()):
        old.parent.rmdir()


def _check(path: Path, keys: Mapping[str, _Key]) -> None:
    found = {name: _key(tensor) for name, tensor in _external(ir.load(path)).items()}
    for name, key in keys.items():
        if found.get(name) != key:
            raise ExportError(f"{path.name}: weight {name} is another one after its file was shared; export again")
