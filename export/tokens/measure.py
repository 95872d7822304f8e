"""How long encoder and connector take on this machine: exported graphs where there are some, else PyTorch.

Weights are random where the model's own are not in a graph: speed does not depend on their values.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DependencyError
from ...models.contract import StageContract
from .subjects import Subject, has_torch

Arrays = Mapping[str, npt.NDArray[Any]]
Shape = tuple[int, ...]
ROUNDS = 5
# A stage that takes longer is run fewer times, but once behind the warm-up at least.
BUDGET_SECONDS = 30.0
_BLOCK = 65_536


@dataclass(frozen=True)
class Timing:
    """Median wall time of one call over `rounds` calls behind one that warms up, and who computed.

    `best_ms`: of the fastest call; on a machine that has other work, the steadier figure.
    """

    ms: float
    best_ms: float
    rounds: int
    engine: str


def time_calls(call: Callable[[], object], engine: str, rounds: int = ROUNDS) -> Timing:
    """`call` over and over, until `rounds` are done or `BUDGET_SECONDS` are spent."""
    call()
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < rounds and (not seconds or time.perf_counter() - started < BUDGET_SECONDS):
        before = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - before)
    return Timing(1000.0 * median(seconds), 1000.0 * min(seconds), len(seconds), engine)


def measure_stage(subject: Subject, stage: str, inputs: Arrays, rounds: int = ROUNDS) -> Timing | None:
    """One stage of `subject` on `inputs`: its graph through ONNX Runtime, else its module through PyTorch.

    None where the weights would not fit into the memory that is free. Raises DependencyError where nothing here can
    compute it, EngineError where ONNX Runtime fails.
    """
    if stage in subject.graphs:
        return time_graph(subject.graphs[stage], subject.contracts[stage], inputs, rounds)
    if subject.layout is None:
        raise DependencyError(
            f"{subject.name}: --measure needs torch for a model that has no exported graphs; install "
            "'bridgeport[export]', or give a bundle"
        )
    parameters = subject.layout.stages[stage].on_meta().parameters()
    if 4 * sum(parameter.numel() for parameter in parameters) > _free_bytes():
        return None
    module = subject.layout.load(stage, RandomWeights(subject.layout.stages[stage]))
    return time_module(module, [inputs[spec.name] for spec in subject.contracts[stage].inputs], rounds)


def time_module(module: Any, inputs: Iterable[npt.NDArray[Any]], rounds: int = ROUNDS) -> Timing:
    """A PyTorch module on the CPU, FP32, with as many threads as PyTorch takes."""
    import torch

    tensors = [torch.from_numpy(array) for array in inputs]
    with torch.inference_mode():
        return time_calls(lambda: module(*tensors), "PyTorch", rounds)


def time_graph(file: Path, contract: StageContract, inputs: Arrays, rounds: int = ROUNDS) -> Timing:
    """A graph through the run time's own engine, with as many threads as PyTorch would take."""
    from ...runtime.onnxruntime.loader import Device, load_session
    from ...runtime.onnxruntime.runner import OnnxRuntimeEngine

    device = Device()
    session = load_session(file, device, threads=_threads())
    with OnnxRuntimeEngine(contract, session, device) as engine:
        return time_calls(lambda: engine.run(inputs), "ONNX Runtime", rounds)


def stage_inputs(contract: StageContract, given: Arrays, image_embeds: tuple[int, ...] | None) -> Arrays:
    """All inputs of a stage: those in `given`, normal numbers for `image_embeds`, ones for texts and masks."""
    shapes = {name: array.shape for name, array in given.items()}
    if image_embeds is not None:
        shapes["image_embeds"] = image_embeds
    inputs: dict[str, npt.NDArray[Any]] = {}
    for spec, shape in zip(contract.inputs, input_shapes(contract, shapes), strict=True):
        if spec.name in given:
            inputs[spec.name] = np.ascontiguousarray(given[spec.name])
        elif spec.dtype == "float32":
            inputs[spec.name] = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        else:
            inputs[spec.name] = np.ones(shape, spec.dtype)
    return inputs


def input_shapes(contract: StageContract, shapes: Mapping[str, Shape]) -> list[Shape]:
    """Shapes of all inputs, in order; sizes that `shapes` does not tell are what the axis is tuned for."""
    sizes = {axis.name: axis.opt for axis in contract.axes}
    for spec in contract.inputs:
        for dim, size in zip(spec.shape, shapes.get(spec.name, ()), strict=False):
            if isinstance(dim, str):
                sizes[dim] = size
    return [tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape) for spec in contract.inputs]


class RandomWeights:
    """Small random numbers in the shapes of a stage, as `Layout.load` reads them. One block of them is repeated."""

    def __init__(self, stage: Any) -> None:
        self._shapes = {
            stage.checkpoint_name(key): tuple(tensor.shape) for key, tensor in stage.on_meta().state_dict().items()
        }
        self.files: tuple[Path, ...] = ()
        from ...models.weights import TensorEntry

        self.entries = {name: TensorEntry("F32", shape, Path(name)) for name, shape in self._shapes.items()}

    def read(self, names: Iterable[str]) -> dict[str, Any]:
        """See `models.weights.Weights.read`."""
        import torch

        block = 0.02 * torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
        tensors = {}
        for name in names:
            shape = self._shapes[name]
            count = math.prod(shape)
            tensors[name] = block.repeat(-(-count // _BLOCK))[:count].reshape(shape)
        return tensors


def _threads() -> int | None:
    if not has_torch():
        return None
    import torch

    return torch.get_num_threads()


def _free_bytes() -> int:
    import psutil  # type: ignore[import-untyped]  # its hints are a package of their own

    return int(psutil.virtual_memory().available)
