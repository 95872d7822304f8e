"""Activation outliers moved into the weights before 8-bit quantisation.

A few channels of a transformer's activations are 50 to 200 times as large as the others. One scale per tensor then
leaves the others a handful of levels, while weights have a scale per column and room for more. SmoothQuant (Xiao et
al. 2023, arXiv 2211.10438) divides such channels by a scale and multiplies the rows of the weights by it. Here the
strength alpha is searched for each group of products that share an input, and staying off is one of the answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ..errors import InputError
from .observers import ObserverSettings
from .records import FloatArray, Observations, TensorRange, TensorStats
from .smooth_fold import FoldSmoothing
from .smooth_groups import ChannelWeight, Kind, SmoothGroup, find_groups, values_to_watch
from .smooth_search import Choice, Products, choose_alpha
from .smooth_stats import divide_channels, split_heads

__all__ = ["ALPHAS", "SmoothedGroup", "Smoothing", "smooth", "values_to_watch"]

ALPHAS: tuple[float | None, ...] = (None, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class SmoothedGroup:
    """What was decided for the products that read one activation.

    `value`: its name. `nodes`: names of the products. `kind`: where the scale went ("norm", "linear", or "mul" for an
    extra operator). `alpha`: None is off. `error`, `error_off`: relative squared error of a token's outputs in INT8
    on observed rows, as decided and without smoothing. `skipped`: why it was not searched, else None.
    """

    value: str
    nodes: tuple[str, ...]
    kind: Kind
    alpha: float | None
    error: float
    error_off: float
    skipped: str | None = None


@dataclass(frozen=True)
class Smoothing:
    """A smoothed graph. Its float outputs are those of the graph before, but for rounding.

    `alphas`: name of the activation -> alpha, None where it was left alone. `ranges`: value name -> new range, of the
    tensors that changed or are new, as the observer asked for has them. `observations`: all tensors, those that
    changed brought up to date, for every observer that ran.
    """

    model: ir.Model
    alphas: Mapping[str, float | None]
    groups: tuple[SmoothedGroup, ...]
    ranges: Mapping[str, TensorRange]
    observations: Observations


def smooth(
    model: ir.Model,
    observations: Observations,
    *,
    bits: int = 8,
    alphas: Sequence[float | None] = ALPHAS,
    observer: str = "minmax",
    settings: ObserverSettings | None = None,
    max_rows: int = 128,
    max_columns: int = 512,
) -> Smoothing:
    """Smooth the activations of `model` (FP32, rewritten in place) wherever that lowers the quantised error.

    `observations`: must hold `values_to_watch(model)`; groups without are left alone. `alphas`: those to try; None is
    always tried. `observer`: whose ranges `Smoothing.ranges` holds. `settings`: those that the observers ran with.
    `max_rows`, `max_columns`: how many observed rows and columns of each weight an alpha is tried on. The same
    arguments give the same graph.

    Raises InputError for an alpha outside (0, 1) or an observer that did not run.
    """
    _check(observations, alphas, observer)
    groups = find_groups(model)
    skipped = {group.name: _why_not(group, observations) for group in groups}
    choices = {group.name: Choice(None, 0.0, 0.0) for group in groups}
    for group in (group for group in groups if skipped[group.name] is None):
        choices[group.name] = choose_alpha(
            observations.tensors[group.name],
            Products((_rows_of(weight) for weight in group.products), max_columns),
            alphas,
            bits=bits,
            needs_mul=group.kind == "mul",
            max_rows=max_rows,
        )
    scales = {name: choice.scale for name, choice in choices.items() if choice.scale is not None}
    fold = FoldSmoothing(scales)
    if fold.requires(model) is None:
        model, _ = fold.run(model)
    changed = _changed(groups, fold, observations, settings or ObserverSettings())
    return Smoothing(
        model,
        {name: choice.alpha for name, choice in choices.items()},
        tuple(_decided(group, choices[group.name], skipped[group.name]) for group in groups),
        {name: stats.ranges[observer] for name, stats in changed.items()},
        replace(observations, tensors={**observations.tensors, **changed}),
    )


def _decided(group: SmoothGroup, choice: Choice, skipped: str | None) -> SmoothedGroup:
    return SmoothedGroup(group.name, group.nodes, group.kind, choice.alpha, choice.error, choice.error_off, skipped)


def _check(observations: Observations, alphas: Sequence[float | None], observer: str) -> None:
    for alpha in alphas:
        if alpha is not None and not 0 < alpha < 1:
            raise InputError(f"smoothing: alpha {alpha}; accepted are numbers between 0 and 1, and None for off")
    ran = {name for stats in observations.tensors.values() for name in stats.ranges}
    if observations.tensors and observer not in ran:
        raise InputError(f"smoothing: the observer {observer!r} did not run; those that did are {sorted(ran)}")


def _why_not(group: SmoothGroup, observations: Observations) -> str | None:
    """Why `group` cannot be searched, None when it can."""
    stats = observations.tensors.get(group.name)
    if stats is None:
        return "its input was not observed"
    if stats.channel_min is None or stats.channel_max is None or stats.rows is None or not len(stats.rows):
        return "its input was observed without channels or rows"
    if len(stats.channel_min) != group.width:
        return f"its input was observed with {len(stats.channel_min)} channels, the weights have {group.width}"
    blind = [name for name in (*group.along, *(name for name, _ in group.by_head)) if _is_blind(name, observations)]
    if blind:
        return f"{blind[0]} was observed without channels"
    for value, base in group.by_head:
        # Quantised attention reads it, and its new range must come from somewhere.
        if value in observations.tensors and base not in observations.tensors:
            return f"{value} was observed and {base}, which its new range follows from, was not"
    return None


def _is_blind(name: str, observations: Observations) -> bool:
    stats = observations.tensors.get(name)
    return stats is not None and stats.channel_min is None


def _rows_of(weight: ChannelWeight) -> FloatArray:
    """The weight as float32 `[C, N]`."""
    tensor = weight.value.const_value
    if tensor is None:  # ChannelWeight.value has looked
        raise ValueError(f"{weight.value.name} is no initializer")
    array = tensor.numpy().astype(np.float32)
    return array if weight.axis == 0 else array.T


def _changed(
    groups: Sequence[SmoothGroup], fold: FoldSmoothing, observations: Observations, settings: ObserverSettings
) -> dict[str, TensorStats]:
    """New statistics of every observed value that the scales changed, and of the outputs of new Muls."""
    changed: dict[str, TensorStats] = {}
    seen = observations.tensors
    for group in (group for group in groups if group.name in fold.outputs):
        scale = fold.scales[group.name]
        changed[fold.outputs[group.name]] = divide_channels(seen[group.name], scale, settings)
        for value in group.along:
            if value in seen:
                changed[value] = divide_channels(seen[value], scale, settings)
        for value, base in group.by_head:
            if value in seen:
                changed[value] = split_heads(changed[base], group.head_size)
    return changed
