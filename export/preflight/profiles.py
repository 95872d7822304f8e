"""Dynamic axes and optimization profiles: every axis covered, ordered, and its corners.

A corner is one setting of all axes at which each is at the least, best or largest size of its profile. Axes that hang
together stay so: `total_sequence` is `past_sequence + sequence`, with a past of 0 in a prefill, and `image_sequence` so
many times the latents as there are `images`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ...manifest import Manifest, StageRecord
from ...models.contract import StageContract, TensorSpec
from ...models.flamingo_contract import IMAGE_SEQUENCE
from ..tensorrt.profiles import IMAGES, PAST, parse_profiles, stage_inputs, stage_outputs, stage_profiles
from .findings import Finding

TOKENS, TOTAL, BATCH = "sequence", "total_sequence", "batch"
# Three axes in all combinations; with more, one axis at a time leaves the middle.
MOST_CORNERS = 27
# Kernels are chosen for `opt` and must only be valid elsewhere.
WIDE_RANGE = 64
Range = tuple[int, int, int]


@dataclass(frozen=True)
class Corner:
    """`sizes`: every axis of the graph's inputs, `past_sequence` of a cache among them."""

    profile: str
    sizes: Mapping[str, int]

    def label(self) -> str:
        """ "batch=4 sequence=128"."""
        return " ".join(f"{axis}={size}" for axis, size in self.sizes.items()) or "static"


def stage_corners(stage: StageRecord, manifest: Manifest, profiles: Sequence[str] = ()) -> list[Corner]:
    """Corners of every profile of the stage, the smallest first, each once."""
    found: dict[tuple[tuple[str, int], ...], Corner] = {}
    for name, axes in _profiles(stage, manifest, profiles):
        for sizes in _settings(axes):
            found.setdefault(tuple(sorted(sizes.items())), Corner(name, sizes))
    return sorted(found.values(), key=lambda corner: _volume(corner.sizes))


def input_specs(stage: StageRecord, manifest: Manifest) -> tuple[TensorSpec, ...]:
    """Inputs of the graph with those of the cache, whichever form it has."""
    cache = manifest.kv_cache
    specs = stage_inputs(stage, manifest)
    if stage.contract.name != "llm" or cache is None or not cache.shared_buffer:
        return specs
    shape = (BATCH, cache.num_heads, TOTAL, cache.head_size)
    names = (cache.past.format(layer=i, kind=kind) for i in range(cache.num_layers) for kind in ("key", "value"))
    return (*specs, *(TensorSpec(name=name, dtype=cache.dtype, shape=shape) for name in names))


def output_specs(stage: StageRecord, manifest: Manifest) -> tuple[TensorSpec, ...]:
    """Outputs of the graph; a shared cache is none, since past and present are one buffer."""
    return stage_outputs(stage, manifest)


def check_axes(stage: StageRecord, manifest: Manifest, model: ir.Model) -> Iterator[Finding]:
    """Every dynamic axis of the graph is one of the contract, and the other way round; ranges are in order."""
    name = stage.contract.name
    specs = {spec.name: spec for spec in input_specs(stage, manifest)}
    for value in model.graph.inputs:
        if value.name in specs:
            yield from _check_shape(name, specs[value.name], value)
        elif value.shape is None or any(not isinstance(dim, int) for dim in value.shape):
            why = f"the input {value.name} {_shown(value)} has dynamic axes, and the contract does not know it"
            fix = "add it to the contract with bounds for each axis: without them there is no profile and no build"
            yield Finding("profile", "error", name, value.name or "?", why, fix)
    yield from _check_ranges(stage.contract)


def _check_shape(stage: str, spec: TensorSpec, value: ir.Value) -> Iterator[Finding]:
    dims = None if value.shape is None else list(value.shape)
    if dims is None or len(dims) != len(spec.shape):
        why = f"the contract has {list(spec.shape)}, the graph {_shown(value)}"
        yield Finding("profile", "error", stage, spec.name, why, "export the stage again, or correct the contract")
        return
    for index, (wanted, dim) in enumerate(zip(spec.shape, dims, strict=True)):
        if isinstance(dim, int):
            if wanted == dim:
                continue
            why = f"axis {index} is {wanted!r} in the contract and fixed at {dim} in the graph: it was baked in"
            fix = f"export with {wanted!r} dynamic (an example size of 2 or more), or fix it in the contract"
            yield Finding("profile", "error", stage, spec.name, why, fix)
        elif isinstance(wanted, int):
            why = f"axis {index} is dynamic in the graph ({dim}) and {wanted} in the contract: the profile fixes it"
            fix = "export with that axis static, which gives TensorRT more to fold"
            yield Finding("profile", "note", stage, spec.name, why, fix)


def _check_ranges(contract: StageContract) -> Iterator[Finding]:
    for axis in contract.axes:
        shown = f"{axis.min}, {axis.opt}, {axis.max}"
        if not axis.min <= axis.opt <= axis.max:
            why = f"min, opt and max are {shown}, and must be in this order"
            yield Finding("profile", "error", contract.name, axis.name, why, "correct the contract's axis")
        elif axis.max > WIDE_RANGE * axis.opt:
            why = (
                f"min, opt and max are {shown}: kernels are tuned at opt alone, {axis.max // axis.opt} times below max"
            )
            fix = f"name the sizes that you use, say --profile {contract.name}.{axis.name}=MIN,OPT,MAX"
            yield Finding("profile", "note", contract.name, axis.name, why, fix)


def _profiles(stage: StageRecord, manifest: Manifest, texts: Sequence[str]) -> Iterator[tuple[str, dict[str, Range]]]:
    """Name and ranges of each profile. A cache that is one buffer has a prefill and a decode too."""
    for profile in stage_profiles(stage, manifest, parse_profiles(texts)):
        axes = dict(profile.axes)
        if TOTAL not in axes or PAST in axes:
            yield profile.name, axes
            continue
        others = {axis: sizes for axis, sizes in axes.items() if axis not in (TOKENS, TOTAL)}
        tokens: Range = tuple(min(size, axes[TOTAL][2]) for size in axes[TOKENS])  # type: ignore[assignment]
        past: Range = tuple(max(0, size - 1) for size in axes[TOTAL])  # type: ignore[assignment]
        yield "prefill", {**others, TOKENS: tokens, PAST: (0, 0, 0)}
        yield "decode", {**others, TOKENS: (1, 1, 1), PAST: past}


def _settings(axes: Mapping[str, Range]) -> Iterator[dict[str, int]]:
    """Sizes at the corners; all combinations, or one axis at a time where these would be too many."""
    follows = {TOTAL: PAST, IMAGE_SEQUENCE: IMAGES}
    free = {axis: sizes for axis, sizes in axes.items() if follows.get(axis) not in axes}
    choices = [tuple(dict.fromkeys(sizes)) for sizes in free.values()]
    count = 1
    for choice in choices:
        count *= len(choice)
    combinations = itertools.product(*choices) if count <= MOST_CORNERS else _one_at_a_time(list(free.values()))
    for combination in combinations:
        sizes = dict(zip(free, combination, strict=True))
        if PAST in sizes:
            sizes[TOTAL] = sizes[PAST] + sizes[TOKENS]
        if IMAGES in sizes and IMAGE_SEQUENCE in axes:
            sizes[IMAGE_SEQUENCE] = sizes[IMAGES] * (axes[IMAGE_SEQUENCE][2] // axes[IMAGES][2])
        yield sizes


def _one_at_a_time(ranges: Sequence[Range]) -> Iterator[tuple[int, ...]]:
    best = [sizes[1] for sizes in ranges]
    for place in range(3):
        yield tuple(sizes[place] for sizes in ranges)
        for index, sizes in enumerate(ranges):
            yield (*best[:index], sizes[place], *best[index + 1 :])


def _volume(sizes: Mapping[str, int]) -> int:
    volume = 1
    for axis, size in sizes.items():
        volume *= 1 if axis == PAST else max(1, size)
    return volume


def _shown(value: ir.Value) -> str:
    return "of unknown shape" if value.shape is None else f"[{', '.join(str(dim) for dim in value.shape)}]"
