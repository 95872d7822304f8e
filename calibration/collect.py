"""Activations of a graph, observed in one pass over calibration data."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..errors import CalibrationError, EngineError
from ..runtime.onnxruntime.loader import first_line
from ..runtime.parity.drill import GraphRun
from .cache import ObservationCache, observation_key
from .linears import layer_of
from .observers import ObserverSettings, TensorObserver
from .records import Observations

logger = logging.getLogger(__name__)

Feed = Mapping[str, NDArray[Any]]
_SAVE_EVERY = 16  # samples between two states on disk: at most this much is done again after a kill
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def collect(
    graph: Path,
    inputs: Iterable[Feed] | Callable[[int], Iterable[Feed]],
    watch: Sequence[str],
    *,
    key: str,
    samples: int,
    settings: ObserverSettings | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = logger.warning,
    save_every: int = _SAVE_EVERY,
) -> Observations:
    """Observe the values named in `watch` while `graph` runs on every one of `inputs`.

    The graph runs as it is, nothing fused, its weights read where they lie; each sample runs once and its tensors are
    dropped. `inputs`: one feed (input name -> array) per sample, in a fixed order, or a function from the number of the
    first sample wanted to such an iterable. `key` names them (a hash of the data and of all that made the inputs).
    `samples`: how many to take. `cache`: directory for results and for the state of an unfinished run, None for none;
    the result of a run that was interrupted and started again is that of one run, bit for bit. `progress`: called with
    samples done and `samples`. `note`: gets a line about a cache file that was dropped.

    Raises CalibrationError for a value that is not in the graph or not of floats, for too few inputs, and for an
    activation that is NaN or infinite, naming node, layer and sample.
    """
    settings = settings or ObserverSettings()
    values = _watched(graph, watch)
    if samples < 1:
        raise CalibrationError(f"{samples} samples of {graph} asked for; calibration needs one at least")
    full_key = observation_key(graph, key, samples, watch, settings)
    store = None if cache is None else ObservationCache(cache, full_key, note)
    if store is not None and (known := store.load()) is not None:
        if progress is not None:
            progress(samples, samples)
        return known
    observers = {name: TensorObserver(name, settings, channels=_has_channels(value)) for name, value in values.items()}
    done = start = _resume(store, observers)
    feeds = _starting(inputs, start, samples)
    for done, arrays in enumerate(_activations(graph, list(values), feeds, start), start + 1):
        _update(observers, values, arrays, done - 1)
        if store is not None and done % save_every == 0 and done < samples:
            store.save_state(*_state(observers, done))
        if progress is not None:
            progress(done, samples)
    _check_all_seen(observers, done, samples)
    result = Observations(full_key, samples, {name: observer.finish() for name, observer in observers.items()})
    if store is not None:
        store.save(result)
    return result


def constant_tensors(observations: Observations) -> tuple[str, ...]:
    """Values that were one and the same number throughout: no range can be made of them, so they stay as they are."""
    return tuple(name for name, stats in observations.tensors.items() if stats.minimum == stats.maximum)


def _watched(graph: Path, watch: Sequence[str]) -> dict[str, ir.Value]:
    """The watched values by name, in the order of the graph, so that the first NaN is the one to blame."""
    model = ir.load(graph)
    found = {str(value.name): value for value in model.graph.inputs}
    found |= {str(value.name): value for node in model.graph for value in node.outputs if value.name}
    missing = [name for name in watch if name not in found]
    if missing:
        raise CalibrationError(f"{graph} has no value {missing[0]!r} to watch; name values that its nodes compute")
    for name in watch:
        dtype = found[name].dtype
        if dtype is not None and dtype not in _FLOATS:
            raise CalibrationError(f"{graph}: value {name!r} is {dtype.name}; only floating-point values have a range")
    wanted = set(watch)
    return {name: value for name, value in found.items() if name in wanted}


def _has_channels(value: ir.Value) -> bool:
    """Whether the last axis is not known to be dynamic; what is not known shows when samples come."""
    return value.shape is None or len(value.shape) == 0 or not isinstance(value.shape[-1], ir.SymbolicDim)


def _starting(inputs: Iterable[Feed] | Callable[[int], Iterable[Feed]], start: int, samples: int) -> Iterator[Feed]:
    if callable(inputs):
        return itertools.islice(inputs(start), samples - start)
    return itertools.islice(inputs, start, samples)


def _activations(graph: Path, names: Sequence[str], feeds: Iterator[Feed], start: int) -> Iterator[dict[str, Any]]:
    """The values `names` of each feed; the graph's own inputs are taken from the feed."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    given = {value.name for value in model.graph.input}
    run = GraphRun(model, graph.parent, [name for name in names if name not in given])
    for index, feed in enumerate(feeds, start):
        missing = given - feed.keys() - {tensor.name for tensor in model.graph.initializer}
        if missing:
            raise CalibrationError(f"sample {index} has no input {min(missing)!r}, which {graph} needs")
        try:
            computed = run(feed)
        except EngineError as error:
            reason = first_line(error.__cause__) if isinstance(error.__cause__, Exception) else str(error)
            raise CalibrationError(f"sample {index} does not run through {graph}: {reason}") from error
        yield computed | {name: np.asarray(feed[name]) for name in names if name in given}


def _update(
    observers: Mapping[str, TensorObserver], values: Mapping[str, ir.Value], arrays: Mapping[str, Any], sample: int
) -> None:
    for name, observer in observers.items():
        if not observer.update(arrays[name], sample):
            raise CalibrationError(_not_finite(values[name], arrays[name], sample))


def _not_finite(value: ir.Value, array: NDArray[Any], sample: int) -> str:
    node = value.producer()
    where = "an input of the graph" if node is None else f"computed by node {node.name!r} of layer {layer_of(node)!r}"
    bad = array[~np.isfinite(array)]
    return (
        f"sample {sample}: value {value.name!r}, {where}, is {bad.flat[0]} in {bad.size} of {array.size} places; check "
        "that sample and the checkpoint's weights, no range can be made of it"
    )


def _state(observers: Mapping[str, TensorObserver], done: int) -> tuple[dict[str, NDArray[Any]], Any]:
    arrays = {
        f"{index}.{field}": array
        for index, observer in enumerate(observers.values())
        for field, array in observer.state().items()
    }
    return arrays, {"done": done, "names": list(observers)}


def _resume(store: ObservationCache | None, observers: Mapping[str, TensorObserver]) -> int:
    """Put an unfinished run's state into `observers`; the number of samples that it has seen."""
    saved = None if store is None else store.load_state()
    if saved is None:
        return 0
    arrays, meta = saved
    states: list[dict[str, NDArray[Any]]] = [{} for _ in observers]
    for name, array in arrays.items():
        index, field = name.split(".", 1)
        states[int(index)][field] = array
    for observer, state in zip(observers.values(), states, strict=True):
        observer.restore(state)
    return int(meta["done"])


def _check_all_seen(observers: Mapping[str, TensorObserver], done: int, samples: int) -> None:
    if done < samples:
        raise CalibrationError(f"the calibration data gave {done} samples of the {samples} that were announced")
    for observer in observers.values():
        if observer.samples == 0:
            raise CalibrationError(f"value {observer.name!r} was empty in all {samples} samples; give others")
