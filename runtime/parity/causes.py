"""Why a node departs: its weights and attributes against those of PyTorch's module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .probes import FLOATS, Probe

_NORMS = frozenset(
    {
        "LayerNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
# Weights are copied, not computed, so they are equal to the bit, but for constants that the exporter folded.
_EQUAL = 1e-6


def find_causes(model: Any, folder: Path, nodes: Sequence[Any], reference: Any, probe: Probe) -> tuple[str, ...]:
    """One sentence for each weight or epsilon of `nodes` that differs from PyTorch's; `folder` has the
    external data.

    `reference`: the torch module in which the probe's modules are named. Quantised weights are not compared.
    """
    causes: list[str] = []
    module = reference.get_submodule(probe.modules[0])
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in nodes:
        if probe.side == "output" and (cause := epsilon_cause(node, module)):
            causes.append(cause)
        for name in node.input:
            tensor = initializers.get(name)
            if tensor is None or tensor.data_type not in FLOATS or len(tensor.dims) == 0:
                continue
            cause = _weight(name, _load(tensor, folder), _candidates(reference, probe))
            if cause and cause not in causes:
                causes.append(cause)
    return tuple(causes)


def _load(tensor: Any, folder: Path) -> NDArray[Any]:
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(tensor, base_dir=str(folder)))


def epsilon_cause(node: Any, module: Any) -> str | None:
    """What is wrong with the epsilon of a normalisation node; None for a right one and for any other node."""
    expected = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    found = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
    if node.op_type not in _NORMS or expected is None or np.isclose(found, expected, rtol=1e-5, atol=0.0):
        return None
    return f"epsilon of {node.name} is {found:.3g}, PyTorch has {expected:.3g}"


def _candidates(reference: Any, probe: Probe) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """PyTorch's weights in the order in which to look: the module's own, several joined, then all of the
    stage.
    """
    from .reference import array

    modules = [(name, reference.get_submodule(name)) for name in probe.modules]
    for name, module in modules:
        for parameter, tensor in module.named_parameters():
            yield f"{name}.{parameter}", array(tensor)
            if probe.third is not None:
                yield f"{name}.{parameter}", np.split(array(tensor), 3)[probe.third]
    if len(modules) > 1:
        for kind in ("weight", "bias"):
            parts = [getattr(module, kind, None) for _, module in modules]
            if all(part is not None for part in parts):
                yield f"{probe.label}.{kind}", np.concatenate([array(part) for part in parts])
    for name, tensor in reference.named_parameters():
        yield name, array(tensor)


def _weight(name: str, value: NDArray[Any], candidates: Iterator[tuple[str, NDArray[np.float32]]]) -> str | None:
    """What differs between the initializer and the nearest of PyTorch's weights of its shape, as it is or
    transposed.
    """
    nearest: tuple[float, str, NDArray[np.float32]] | None = None
    for parameter, tensor in candidates:
        for shaped in (tensor, tensor.T) if tensor.ndim == 2 else (tensor,):
            if shaped.shape != value.shape:
                continue
            error = np.abs(shaped - value)
            if float(error.max()) <= _EQUAL:
                return None
            if nearest is None or float(error.mean()) < nearest[0]:
                nearest = (float(error.mean()), parameter, shaped)
    # Another constant that happens to have a weight's shape shares no value with it.
    if nearest is None or np.mean(np.abs(nearest[2] - value) <= _EQUAL) < 0.25:
        return None
    return _describe(name, value, nearest[1], nearest[2])


def _describe(name: str, value: NDArray[Any], parameter: str, expected: NDArray[np.float32]) -> str:
    error = np.abs(expected - value)
    differ = int((error > _EQUAL).sum())
    at = np.unravel_index(int(error.argmax()), error.shape)
    rows = np.flatnonzero((error.reshape(-1, error.shape[-1]) > _EQUAL).any(axis=-1))
    flat, target = value.reshape(-1, value.shape[-1])[rows], expected.reshape(-1, value.shape[-1])[rows]
    if 1 < len(rows) <= 64 and np.array_equal(_sorted_rows(flat), _sorted_rows(target)):
        return f"rows {rows.tolist()} of {parameter} stand in each other's place ({name})"
    return (
        f"{differ} of {value.size} values of {parameter} differ ({name}), most at {[int(i) for i in at]}: "
        f"{float(value[at]):.6g}, PyTorch has {float(expected[at]):.6g}"
    )


def _sorted_rows(rows: NDArray[Any]) -> NDArray[Any]:
    return rows[np.lexsort(rows.T)]
