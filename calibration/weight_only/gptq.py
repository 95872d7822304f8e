"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): the error of each rounded row is made up for in the rows after it.

A weight is `[K, N]`; its rows are rounded one by one. `H = X^T X` over the inputs `[tokens, K]` of the layer says how
much a change in one row can be undone in another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CalibrationError
from ...runtime.parity.drill import GraphRun
from .blocks import BlockedWeight, Floats, ScaleRule, as_blocks, by_columns, to_levels

Doubles = NDArray[np.float64]
# Part of the mean diagonal that is added to the diagonal of H, as in the paper.
_DAMPING = 0.01
# Rows whose errors are gathered before the rows after them are corrected in one product.
_ROWS = 128


def gptq(weight: Floats, hessian: Doubles, bits: int, block_size: int, rule: ScaleRule) -> BlockedWeight:
    """Round `weight` `[K, N]` against `hessian` `[K, K]`.

    The scale of a block is chosen when its first row is reached, from its weights with the corrections so far. Columns
    do not depend on each other.
    """
    inverse = _inverse_factor(hessian)
    return by_columns(weight, lambda part: _round_columns(part, inverse, bits, block_size, rule))


def _round_columns(weight: Floats, inverse: Doubles, bits: int, block_size: int, rule: ScaleRule) -> BlockedWeight:
    rows = len(weight)
    left = weight.astype(np.float64)
    values = np.zeros(weight.shape, np.int8)
    scales = np.zeros((-(-rows // block_size), weight.shape[1]), np.float32)
    # A group holds whole blocks, so that a block has all corrections when its scale is chosen.
    step = max(_ROWS, block_size)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        errors = np.zeros((end - start, weight.shape[1]))
        for row in range(start, end):
            block = row // block_size
            if row % block_size == 0:
                current = left[row : row + block_size].astype(np.float32)
                scales[block] = rule(as_blocks(current, block_size), bits)[0]
            rounded = to_levels(left[row].astype(np.float32), scales[block], bits)
            values[row] = rounded.astype(np.int8)
            errors[row - start] = (left[row] - rounded * scales[block]) / inverse[row, row]
            left[row + 1 : end] -= np.outer(inverse[row, row + 1 : end], errors[row - start])
        left[end:] -= inverse[start:end, end:].T @ errors
    return BlockedWeight(values, scales, block_size)


def _inverse_factor(hessian: Doubles) -> Doubles:
    """Upper triangular U with `U^T U = inverse(H)`; inputs that are always 0 get a diagonal of 1."""
    damped = hessian.copy()
    diagonal = np.arange(len(damped))
    damped[diagonal, diagonal] += np.where(damped[diagonal, diagonal] == 0, 1, 0)
    damped[diagonal, diagonal] += _DAMPING * damped[diagonal, diagonal].mean()
    factor: Doubles = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor


def collect_hessians(
    decoder: Path, names: Sequence[str], inputs: Iterable[Mapping[str, NDArray[Any]]]
) -> dict[str, Doubles]:
    """Value name -> `X^T X` `[K, K]` of its rows over all `inputs` of the graph, padding left out.

    ``inputs``: an empty cache is added where they have none. Raises CalibrationError when there are none or a value is
    not finite, EngineError when the graph does not run on them.
    """
    import onnx

    model = onnx.load(str(decoder), load_external_data=False)
    given = {value.name for value in model.graph.input}
    run = GraphRun(model, decoder.parent, [name for name in names if name not in given])
    sums: dict[str, Doubles] = {}
    for feed in inputs:
        computed = {**feed, **run(add_empty_cache(model.graph, feed))}
        for name in names:
            rows = _token_rows(computed[name], feed.get("attention_mask")).astype(np.float64)
            if not np.isfinite(rows).all():
                raise CalibrationError(
                    f"{name} is not finite on a calibration sample; look for what is wrong with the picture or the "
                    "checkpoint, or round to nearest (method rtn)"
                )
            product = rows.T @ rows
            sums[name] = sums[name] + product if name in sums else product
    if not sums:
        raise CalibrationError("GPTQ got no calibration samples; give at least one, or round to nearest (method rtn)")
    return sums


def add_empty_cache(graph: Any, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """`feed` and a cache `[batch, heads, past, size]` of zeros for each input of the GraphProto that it does not have.

    A cache that is written in place is as long as the mask; one that grows (no GroupQueryAttention) holds no token yet.
    """
    grows = all(node.op_type != "GroupQueryAttention" for node in graph.node)
    stored = {tensor.name for tensor in graph.initializer}
    complete = dict(feed)
    for value in graph.input:
        if value.name not in feed and value.name not in stored:
            _, heads, _, size = (dim.dim_value for dim in value.type.tensor_type.shape.dim)
            batch, total = feed["attention_mask"].shape
            complete[value.name] = np.zeros((batch, heads, 0 if grows else total, size), np.float32)
    return complete


def _token_rows(array: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[Any]:
    held = mask is not None and array.ndim == mask.ndim + 1 and array.shape[: mask.ndim] == mask.shape
    rows: NDArray[Any] = array[mask != 0] if held else array.reshape(-1, array.shape[-1])
    return rows
