"""Which nodes FP16 would break, from what calibration saw."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .fp16_operators import EXACT, FLOAT16_MAX, float_inputs, has_float_output, is_float
from .linears import find_linears
from .records import Observations, TensorStats

# Room for pictures that calibration has not seen: their largest activations are within a factor of two of those of a
# few dozen pictures, and a factor of four costs nothing, as digits of FP16 do not depend on the magnitude.
HEADROOM = 4.0
ACTIVATION_LIMIT = FLOAT16_MAX / HEADROOM
# FP16 leaves a product 3e-4 of its size. Where large products cancel, the rest is off by more; 1 % is what INT8 costs.
MAX_ERROR = 0.01
# Rows that the products are computed for, the largest first.
_ROWS = 64
_UNIT = 2.0**-11

Floats = NDArray[np.float32]


def watched_values(model: ir.Model) -> tuple[str, ...]:
    """Names of the values that `choose_float32_nodes` asks for: float inputs and every float that is computed, not
    moved.
    """
    names = [value.name or "" for value in model.graph.inputs if is_float(value)]
    for node in model.graph:
        if node.op_type not in EXACT and node.op_type != "Constant":
            names += [value.name for value in node.outputs if value.name and is_float(value)]
    return tuple(names)


def choose_float32_nodes(
    model: ir.Model, observations: Observations, *, limit: float = ACTIVATION_LIMIT, max_error: float = MAX_ERROR
) -> dict[str, str]:
    """Node name -> why it must stay FP32; for `ToFloat16(keep=...)`.

    A node stays when a value that it reads or gives was seen beyond ``limit``, when the partial sums of a product with
    a weight pass it (kernels may accumulate in FP16), or when rounding its inputs, weight and output to FP16 moves its
    result on the recorded rows by more than ``max_error`` of the result (large terms that cancel). Tensors that were
    not observed count as harmless, except that values which are only moved have the range of their source. Islands
    are listed too where they apply: naming them again does no harm.
    """
    stats = _moved_stats(model, observations)
    chosen: dict[str, str] = {}
    for node in model.graph:
        reason = _range_reason(node, stats, limit) or _cancellation_reason(node, stats, max_error)
        if reason is not None:
            chosen[node.name or ""] = reason
    for name, reason in _product_reasons(model, observations, limit, max_error):
        chosen.setdefault(name, reason)
    return chosen


def _moved_stats(model: ir.Model, observations: Observations) -> dict[str, tuple[float, float]]:
    """Value name -> (minimum, maximum), through nodes that only move values."""
    known = {name: (stats.minimum, stats.maximum) for name, stats in observations.tensors.items()}
    for node in model.graph:
        if node.op_type not in EXACT or not has_float_output(node):
            continue
        sources = [value for _, value in float_inputs(node)]
        # A constant that is joined in (padding, a mask) is looked at as a weight.
        ranges = [known[value.name] for value in sources if value.name in known]
        for output in node.outputs:
            if output.name and output.name not in known and ranges:
                ends = min(low for low, _ in ranges), max(high for _, high in ranges)
                known[output.name] = (-ends[1], -ends[0]) if node.op_type == "Neg" else ends
    return known


def _range_reason(node: ir.Node, known: dict[str, tuple[float, float]], limit: float) -> str | None:
    values = [("reads", value) for _, value in float_inputs(node)]
    values += [("gives", value) for value in node.outputs if is_float(value)]
    for verb, value in values:
        low, high = known.get(value.name or "", (0.0, 0.0))
        largest = max(abs(low), abs(high))
        if not largest <= limit:  # NaN too
            return (
                f"{verb} {value.name}, seen at {largest:.4g}; FP16 ends at {FLOAT16_MAX:.0f}, the limit is {limit:.0f}"
            )
    return None


def _cancellation_reason(node: ir.Node, known: dict[str, tuple[float, float]], max_error: float) -> str | None:
    """A sum of activations whose result is far smaller than what was added."""
    if node.op_type not in ("Add", "Sub") or len(float_inputs(node)) != 2:
        return None
    ranges = [known.get(value.name or "") for _, value in float_inputs(node)]
    result = known.get(node.outputs[0].name or "")
    if result is None or any(one is None for one in ranges):
        return None
    largest = max(max(abs(low), abs(high)) for low, high in filter(None, ranges))
    left = max(abs(result[0]), abs(result[1]))
    if left > 0 and largest * _UNIT > max_error * left:
        return f"adds values of up to {largest:.4g} whose sum is at most {left:.4g}"
    return None


def _product_reasons(
    model: ir.Model, observations: Observations, limit: float, max_error: float
) -> Iterator[tuple[str, str]]:
    """Products with a stored weight, on the recorded rows of their input."""
    nodes = {node.name: node for node in model.graph}
    for linear in find_linears(model):
        stats, weight = observations.tensors.get(linear.input), model.graph.initializers[linear.weight].const_value
        if stats is None or stats.rows is None or weight is None or linear.op_type == "Conv":
            continue
        matrix = np.asarray(weight.numpy(), dtype=np.float32)
        if linear.op_type == "Gemm" and nodes[linear.node].attributes.get_int("transB"):
            matrix = matrix.T
        if matrix.ndim != 2 or stats.rows.shape[1] != matrix.shape[0]:
            continue
        reason = _judge_product(_largest_rows(stats), matrix, limit, max_error)
        if reason is not None:
            yield linear.node, reason


def _largest_rows(stats: TensorStats) -> Floats:
    assert stats.rows is not None
    rows = np.asarray(stats.rows, dtype=np.float32)
    order = np.argsort(-np.abs(rows).max(axis=1), kind="stable")
    return rows[order[:_ROWS]]


def _judge_product(rows: Floats, weight: Floats, limit: float, max_error: float) -> str | None:
    """`rows` `[R, K]`, `weight` `[K, N]`."""
    if not np.isfinite(rows).all():
        return "its recorded input is not finite"
    partial = float((np.abs(rows) @ np.abs(weight)).max())
    if partial > limit:
        return f"its partial sums may reach {partial:.4g}; the limit is {limit:.0f}"
    exact = rows @ weight
    with np.errstate(over="ignore"):
        half = rows.astype(np.float16).astype(np.float32) @ weight.astype(np.float16).astype(np.float32)
        half = half.astype(np.float16).astype(np.float32)
    size = np.linalg.norm(exact, axis=1)
    error = np.linalg.norm(half - exact, axis=1) / np.where(size > 0, size, 1.0)
    worst = float(error.max(initial=0.0))
    return None if worst <= max_error else f"FP16 changes its result by {worst:.2%}; the limit is {max_error:.0%}"
