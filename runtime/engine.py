"""What computes a stage: one interface, one folder per backend.

The public method checks against the stage's contract, the private one computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from ..models.contract import KvCacheContract, StageContract, TensorSpec
from .kv_cache import KvCache

Arrays = Mapping[str, NDArray[Any]]
Call = Callable[[], None]


class DeviceMemory(Protocol):
    """Arrays in the memory of an accelerator: they have a shape, a type and a length, and `np.asarray` copies them.

    They pass for numpy arrays where an engine takes and gives them; rows are those of the first axis.
    """

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A new array with whatever was in its memory."""

    def concatenate(self, arrays: Sequence[Any]) -> Any:
        """Along the first axis."""

    def take(self, source: Any, rows: NDArray[np.int64]) -> Any:
        """`source[rows]`."""

    def synchronize(self) -> None:
        """Wait until all arrays hold what was computed into them."""

    def put(self, target: Any, rows: NDArray[np.int64], source: Any) -> None:
        """`target[rows] = source`."""


class Engine(ABC):
    """One stage, ready to run. Tensors go in and out as numpy arrays in host memory; closing it frees its
    weights.

    `kv_cache` is the cache's contract for a stage that has one (`llm`), else None.
    """

    def __init__(self, contract: StageContract, kv_cache: KvCacheContract | None = None) -> None:
        self.contract = contract
        self.kv_cache = kv_cache

    # Engines with the same one take and give each other's arrays where they lie; None: numpy arrays alone.
    memory: DeviceMemory | None = None

    def run(self, inputs: Arrays, *, cache: KvCache | None = None, resident: bool = False) -> dict[str, NDArray[Any]]:
        """Compute the outputs of the contract, newly allocated, from all of its inputs.

        `resident`: leave the outputs in `memory`, for an engine with the same one. `llm` without a `cache` runs a
        prefill over one of its own, which is dropped.
        Raises EngineError for inputs that the contract does not allow and when the backend fails.
        """
        sizes = self._check_inputs(inputs)
        empty = self.memory.empty if resident and self.memory is not None else np.empty
        outputs = {spec.name: empty(_shape(spec, sizes), spec.dtype) for spec in self.contract.outputs}
        if cache is None and self.kv_cache is not None:
            cache = self.allocate_cache(sizes["batch"], sizes["total_sequence"])
        self.bind(inputs, outputs, cache=cache)()
        return outputs

    def bind(self, inputs: Arrays, outputs: Arrays, *, cache: KvCache | None = None) -> Call:
        """A call that reads `inputs` as they are then, writes `outputs`, and extends `cache` in place.

        The arrays must be C-contiguous and stay the caller's; binding once and calling often allocates
        nothing. Raises EngineError for arrays that the contract does not allow; the call raises it when the
        backend fails.
        """
        sizes = self._check_inputs(inputs)
        for spec in self.contract.outputs:
            if spec.name not in outputs:
                raise EngineError(f"{self.contract.name}: output {spec.name!r} has no array to be written to")
            if (came := outputs[spec.name].shape) != (expected := _shape(spec, sizes)):
                raise EngineError(f"{self.contract.name}: {spec.name} is {list(came)}, it must be {list(expected)}")
            self._check_array(spec, outputs[spec.name])
        if self.kv_cache is not None:
            self._check_cache(cache, sizes)
        return self._bind(inputs, outputs, cache)

    def allocate_cache(self, batch: int, capacity: int) -> KvCache:
        """A cache that this engine can write to. EngineError for a stage without one."""
        if self.kv_cache is None:
            raise EngineError(f"{self.contract.name}: this stage has no key/value cache; only llm has one")
        return KvCache.allocate(self.kv_cache, batch, capacity)

    @abstractmethod
    def close(self) -> None:
        """Free the weights; the engine does not run any more."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _bind(self, inputs: Arrays, outputs: Arrays, cache: KvCache | None) -> Call:
        """As `bind`, everything checked."""

    def _check_inputs(self, inputs: Arrays) -> dict[str, int]:
        name = self.contract.name
        known = [spec.name for spec in self.contract.inputs]
        if unknown := sorted(set(inputs) - set(known)):
            raise EngineError(f"{name}: there is no input {unknown[0]!r}; it takes {', '.join(known)}")
        try:
            sizes = self.contract.bind_axes({key: array.shape for key, array in inputs.items()})
        except ValueError as error:
            raise EngineError(str(error)) from error
        for spec in self.contract.inputs:
            self._check_array(spec, inputs[spec.name])
        return sizes

    def _check_array(self, spec: TensorSpec, array: NDArray[Any]) -> None:
        if array.dtype != np.dtype(spec.dtype):
            raise EngineError(f"{self.contract.name}: {spec.name} is {array.dtype}, accepted is {spec.dtype}")
        if not array.flags.c_contiguous:
            raise EngineError(
                f"{self.contract.name}: {spec.name} is not C-contiguous; pass np.ascontiguousarray(...) of it"
            )

    def _check_cache(self, cache: KvCache | None, sizes: dict[str, int]) -> None:
        if cache is None:
            raise EngineError(f"{self.contract.name}: bind needs a cache; make one with allocate_cache")
        batch, length = sizes["batch"], sizes["total_sequence"]
        if not cache.holds(batch, length):
            raise EngineError(
                f"{self.contract.name}: {batch} rows of {length} tokens came, but the cache holds "
                f"{cache.batch} of {cache.capacity}; allocate a larger one"
            )


def share_memory(engines: Iterable[Engine]) -> bool:
    """Whether each engine can read where it lies what another one left in its memory."""
    memories = [engine.memory for engine in engines]
    return memories[0] is not None and all(memory is memories[0] for memory in memories)


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape)
