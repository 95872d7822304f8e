"""Weights as they lie in a checkpoint directory: listed from the files' headers, read one tensor at a time.

Safetensors in one file or in shards; pickle files only where the caller allows them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

# What a weight may be stored as: it is computed with in FP32, so nothing wider and nothing quantised.
FLOAT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: safetensors' name of its dtype ("F32"), its shape, and the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


class Weights(Protocol):
    """The tensors of a checkpoint."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that was listed, the index of shards included."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor by name."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those tensors in FP32 on the CPU.

        A tensor stored in FP32 stays mapped from its file (private, so writing to it changes no file):
        reading costs memory only as it is used. Raises KeyError for a name that is not there.
        """


def open_weights(directory: Path, *, allow_pickle: bool = False) -> Weights:
    """Find and list the weights in `directory`.

    Raises CheckpointError when there are none, when a file is missing, cut off or corrupt, when a tensor is
    stored twice, or when there is only a pickle checkpoint and `allow_pickle` is not given.
    """
    if (directory / SAFETENSORS).is_file():
        return _Safetensors((directory / SAFETENSORS,), ())
    if (directory / SAFETENSORS_INDEX).is_file():
        index = directory / SAFETENSORS_INDEX
        return _Safetensors(_shards(index), (index,))
    pickles = [name for name in (PICKLE, PICKLE_INDEX) if (directory / name).is_file()]
    if not pickles:
        raise CheckpointError(
            f"{directory} has no weights: neither {SAFETENSORS} nor {SAFETENSORS_INDEX}; "
            "copy the whole checkpoint, or save it again with save_pretrained"
        )
    if not allow_pickle:
        raise _refuse_pickle(directory / pickles[0])
    if pickles[0] == PICKLE:
        return _Pickles((directory / PICKLE,), ())
    return _Pickles(_shards(directory / PICKLE_INDEX), (directory / PICKLE_INDEX,))


def open_weight_file(file: Path, *, allow_pickle: bool = False) -> Weights:
    """List the one file `file`: safetensors, or what `torch.save` wrote (a state_dict, or {"model": state_dict}).

    Raises CheckpointError when it is missing, cut off or corrupt, or a pickle that is not allowed.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; copy it there")
    if file.suffix == ".safetensors":
        return _Safetensors((file,), ())
    if not allow_pickle:
        raise _refuse_pickle(file)
    return _Pickles((file,), ())


def _refuse_pickle(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is a pickle checkpoint, which can run code when it is read; save it "
        "as safetensors, or pass --allow-pickle (allow_pickle=True) to read it with weights_only=True"
    )


def _shards(index: Path) -> tuple[Path, ...]:
    """The shard files that `index` names; each must lie beside it."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
        plain = all(PurePosixPath(name).name == name and "\\" not in name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of shards ({_one_line(error)}); copy the checkpoint again"
        ) from error
    if not names or not plain:
        raise CheckpointError(f"{index} names shards {names}; each must be the plain name of a file beside it")
    for name in names:
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing, but {index.name} names it; copy it too")
    return tuple(index.parent / name for name in names)


def _check_index(extra: tuple[Path, ...], entries: Mapping[str, TensorEntry]) -> None:
    """What the index says of each tensor must hold; a shard of another model has the right name too."""
    for index in extra:
        for name, file in json.loads(index.read_bytes())["weight_map"].items():
            if name not in entries or entries[name].file.name != file:
                raise CheckpointError(
                    f"{index} says that {file} holds the tensor {name}, and it does not; copy the checkpoint again"
                )


class _Safetensors:
    """Safetensors files; only headers are read until `read`."""

    def __init__(self, shards: tuple[Path, ...], extra: tuple[Path, ...]) -> None:
        self.files = extra + shards
        entries: dict[str, TensorEntry] = {}
        for shard in shards:
            for name, entry in self._list(shard).items():
                if name in entries:
                    raise CheckpointError(f"tensor {name} is stored twice: in {entries[name].file} and in {shard}")
                entries[name] = entry
        _check_index(extra, entries)
        self.entries: Mapping[str, TensorEntry] = entries

    @staticmethod
    def _list(shard: Path) -> dict[str, TensorEntry]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(shard, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
                return {
                    name: TensorEntry(part.get_dtype(), tuple(part.get_shape()), shard) for name, part in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{shard} ({shard.stat().st_size} bytes) is not a whole safetensors file "
                f"({_one_line(error)}); copy or download it again"
            ) from error

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `Weights.read`."""
        import torch
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in wanted:
                    tensors[name] = file.get_tensor(name).to(torch.float32)
        return tensors


class _Pickles:
    """Files of `torch.save`, read with `weights_only=True`."""

    def __init__(self, shards: tuple[Path, ...], extra: tuple[Path, ...]) -> None:
        self.files = extra + shards
        self._tensors: dict[str, Any] = {}
        entries: dict[str, TensorEntry] = {}
        for shard in shards:
            for name, tensor in self._load(shard).items():
                if name in entries:
                    raise CheckpointError(f"tensor {name} is stored twice: in {entries[name].file} and in {shard}")
                dtype = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
                kind = str(tensor.dtype).removeprefix("torch.")
                entries[name] = TensorEntry(dtype.get(kind, kind), tuple(tensor.shape), shard)
                self._tensors[name] = tensor
        _check_index(extra, entries)
        self.entries: Mapping[str, TensorEntry] = entries

    @staticmethod
    def _load(shard: Path) -> dict[str, Any]:
        import torch

        try:
            try:
                state = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files from before torch 1.6 cannot be mapped
                state = torch.load(shard, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch raises UnpicklingError, RuntimeError, EOFError and more for a file that it cannot take.
            raise CheckpointError(
                f"{shard} cannot be read with weights_only=True ({_one_line(error)}); copy it again, or save it as "
                "safetensors"
            ) from error
        if isinstance(state, dict) and isinstance(state.get("model"), dict):
            state = state["model"]  # a trainer's file: the optimiser's state and settings stand beside the model
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise CheckpointError(f"{shard} holds more than named tensors; save the state_dict as safetensors")
        return state

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `Weights.read`."""
        import torch

        return {name: self._tensors[name].to(torch.float32) for name in names}


def _one_line(error: BaseException) -> str:
    """The first sentence of an error from below, which may run over many lines."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 160 else words[:157] + "..."
