"""What a bundle's engines, and their build, may take of a device's memory: an estimate from the graphs alone.

Weights, key/value cache, inputs and outputs are counted exactly. Activations are the liveness of the graph as it is
written (`liveness`), which is more than a fused engine needs. The build's peak is taken as two to three times the
weights (the graph that was read, the builder's copy, the plan) and the activations of the tactics that are timed. No
figure of this kind was measured on a device: it tells what cannot work from what can, and what lies in between is for
the device to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...manifest import Manifest, StageRecord
from ...models.contract import TensorSpec
from ..memory import release_memory
from ..tensorrt.profiles import PAST, parse_profiles, stage_profiles
from .devices import BUNDLE, GIB, MIB, Device
from .feeds import shape_of
from .findings import Finding
from .liveness import activations, weight_bytes
from .profiles import TOKENS, TOTAL, input_specs, output_specs

BUILD_LEAST, BUILD_MOST = 2.0, 3.0
# Boards this small get limits for their builds.
SMALL_BOARD_GIB = 16
METHOD = (
    "weights, cache, inputs and outputs counted; activations by liveness of the unfused graph (an upper bound for "
    "fused engines, without the tactics' scratch memory); build 2 to 3 times the weights and the activations at max. "
    "An estimate: never measured on a device"
)
_BYTES = {"bfloat16": 2}


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage, at the best and at the largest sizes of its profiles.

    `weights`: by element type. `cache`: of the key/value cache, twice where past and present are apart.
    `build_least`, `build_most`: the range of the build's peak. `unknown`: values whose shape was not found.
    """

    stage: str
    weights: Mapping[str, int]
    activations_opt: int
    activations_max: int
    largest_activation: int
    io_opt: int
    io_max: int
    cache_opt: int
    cache_max: int
    build_least: int
    build_most: int
    unknown: int

    @property
    def weights_total(self) -> int:
        """Bytes of all weights."""
        return sum(self.weights.values())


@dataclass(frozen=True)
class BuildSettings:
    """What to build with on a small board. `unload_others`: nothing else of the bundle may be in memory meanwhile."""

    workspace_mib: int
    tactic_dram_mib: int
    builder_optimization_level: int
    unload_others: bool


@dataclass(frozen=True)
class MemoryEstimate:
    """Of a whole bundle: stages share the memory of their activations, since they never run at once."""

    stages: tuple[StageMemory, ...]
    run_opt: int
    run_max: int
    build_least: int
    build_most: int
    usable: int | None = None
    settings: BuildSettings | None = None
    method: str = METHOD

    def to_json(self) -> dict[str, Any]:
        """As JSON values; everything in bytes."""
        found = asdict(self)
        for row, stage in zip(found["stages"], self.stages, strict=True):
            row["weights_total"] = stage.weights_total
        return {**found, "stages": list(found["stages"])}


def estimate_stage(stage: StageRecord, manifest: Manifest, path: Path, profiles: Sequence[str] = ()) -> StageMemory:
    """The memory of one stage."""
    weights = weight_bytes(ir.load(path))
    inputs, outputs = input_specs(stage, manifest), output_specs(stage, manifest)
    at = {place: _settings(stage, manifest, profiles, place) for place in (1, 2)}
    live = {
        place: [activations(path, {spec.name: shape_of(spec, sizes) for spec in inputs}, sizes) for sizes in settings]
        for place, settings in at.items()
    }
    # The graphs are full of cycles, and while they live their weights stay mapped.
    release_memory()
    own = {spec.name for spec in stage.contract.inputs} | {spec.name for spec in stage.contract.outputs}
    ends = [spec for spec in (*inputs, *outputs) if spec.name in own]
    cache = [spec for spec in (*inputs, *outputs) if spec.name not in own]
    io_opt, io_max = (max(_bytes(ends, sizes) for sizes in at[place]) for place in (1, 2))
    cache_opt, cache_max = (max(_bytes(cache, sizes) for sizes in at[place]) for place in (1, 2))
    total = sum(weights.values())
    peak = max(one.peak for one in live[2])
    return StageMemory(
        stage=stage.contract.name,
        weights=weights,
        activations_opt=max(one.peak for one in live[1]),
        activations_max=peak,
        largest_activation=max(one.largest for one in live[2]),
        io_opt=io_opt,
        io_max=io_max,
        cache_opt=cache_opt,
        cache_max=cache_max,
        build_least=int(BUILD_LEAST * total) + max(one.largest for one in live[2]),
        build_most=int(BUILD_MOST * total) + peak + io_max + cache_max,
        unknown=max(one.unknown for one in live[2]),
    )


def estimate_bundle(stages: Sequence[StageMemory], device: Device | None = None) -> MemoryEstimate:
    """Stages together, and what to set for their build on `device`."""
    weights = sum(one.weights_total for one in stages)
    opt = weights + sum(one.io_opt + one.cache_opt for one in stages) + max(one.activations_opt for one in stages)
    most = weights + sum(one.io_max + one.cache_max for one in stages) + max(one.activations_max for one in stages)
    estimate = MemoryEstimate(
        tuple(stages), opt, most, max(one.build_least for one in stages), max(one.build_most for one in stages)
    )
    if device is None:
        return estimate
    settings = _build_settings(estimate, weights, device)
    return MemoryEstimate(
        estimate.stages, opt, most, estimate.build_least, estimate.build_most, device.usable_bytes, settings
    )


def check_memory(estimate: MemoryEstimate, device: Device) -> Iterator[Finding]:
    """What does not fit, what may not, and what to set on a small board."""
    usable, where = device.usable_bytes, device.name
    held = sum(one.weights_total + one.cache_opt + one.io_opt for one in estimate.stages)
    room = f"{device.title} has {device.memory_gib:g} GiB, of which {shown(usable)} are left beside its system"
    if held > usable:
        why = f"weights, cache and buffers at opt alone take {shown(held)}; {room}"
        fix = "quantise (--precision int8 or int4), or take a larger device"
        yield Finding("memory", "error", BUNDLE, where, why, fix)
    elif estimate.run_max > usable:
        why = f"at the largest sizes it may take {shown(estimate.run_max)} (estimate); {room}"
        fix = "lower the largest sizes, say --profile batch=1,1,4, or quantise"
        yield Finding("memory", "warning", BUNDLE, where, why, fix)
    for one in estimate.stages:
        if one.build_most > usable:
            surely = one.build_least > usable
            why = f"its build may take {shown(one.build_least)} to {shown(one.build_most)} (estimate); {room}"
            fix = "lower WORKSPACE, TACTIC_DRAM and the largest sizes, quantise its weights"
            fix += ", or build on a larger device of the same compute capability" if surely else ""
            yield Finding("build-memory", "warning", one.stage, where, why, fix)
    if estimate.settings is not None:
        yield _settings_finding(estimate, estimate.settings, device)


def shown(size: float) -> str:
    """ "1.25 GiB", "34.0 MiB"."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def _settings_finding(estimate: MemoryEstimate, settings: BuildSettings, device: Device) -> Finding:
    others = (
        "build with the other stages unloaded and no other process on the GPU"
        if settings.unload_others
        else "other stages may stay loaded"
    )
    why = (
        f"host and GPU share {device.memory_gib:g} GiB, and by default tactics may take 75 % of it: the build takes "
        f"{shown(estimate.build_least)} to {shown(estimate.build_most)} (estimate)"
    )
    fix = (
        f"set WORKSPACE to {settings.workspace_mib} MiB, TACTIC_DRAM to {settings.tactic_dram_mib} MiB, builder "
        f"optimisation level {settings.builder_optimization_level}; {others}"
    )
    return Finding("build-settings", "note", BUNDLE, device.name, why, fix)


def _build_settings(estimate: MemoryEstimate, weights: int, device: Device) -> BuildSettings | None:
    """Limits for a board with little memory: the table's, or less where the weights leave less."""
    if not device.unified or device.memory_gib > SMALL_BOARD_GIB or device.workspace_mib is None:
        return None
    largest = max(one.weights_total for one in estimate.stages)
    left = max(256, int(device.usable_bytes - BUILD_LEAST * largest) // MIB)
    unload = estimate.build_most + weights - largest > device.usable_bytes
    dram = min(device.tactic_dram_mib or 0, _power_of_two(left // 2))
    level = device.builder_optimization_level or 3
    return BuildSettings(min(device.workspace_mib, _power_of_two(left // 4)), dram, level, unload)


def _power_of_two(number: int) -> int:
    return 1 << max(6, int(math.log2(max(1, number))))


def _settings(stage: StageRecord, manifest: Manifest, texts: Sequence[str], place: int) -> list[dict[str, int]]:
    """Sizes of every axis at opt (1) or max (2), for each profile."""
    found = []
    for profile in stage_profiles(stage, manifest, parse_profiles(texts)):
        sizes = {axis: sizes[place] for axis, sizes in profile.axes.items()}
        if PAST in sizes:
            sizes[TOTAL] = sizes[PAST] + sizes[TOKENS]
        elif TOTAL in sizes and TOKENS in sizes:
            sizes[TOKENS] = min(sizes[TOKENS], sizes[TOTAL])
            sizes[PAST] = sizes[TOTAL]
        for axis in stage.contract.axes:
            if axis.patches is not None and axis.name not in sizes:
                high, wide = (sizes[edge] // axis.patches.size for edge in axis.patches.edges)
                sizes[axis.name] = high * wide
        found.append(sizes)
    return found


def _bytes(specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> int:
    return sum(
        math.prod(shape_of(spec, sizes)) * (_BYTES.get(spec.dtype) or np.dtype(spec.dtype).itemsize) for spec in specs
    )
