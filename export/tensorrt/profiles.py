"""Optimization profiles: from the stage's contract, narrowed by what the command line asks for.

`--profile "batch=1,4,8 sequence=1,32,64"` is one profile: MIN,OPT,MAX of each axis that is named (one number for all
three), the contract's own range for the others. `encoder.batch=...` is for one stage. Several `--profile` give several
profiles, which all name the same axes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...engine_record import AxisRange, EngineProfile, ShapeRange
from ...errors import InputError
from ...manifest import GenerationContract, Manifest, StageRecord
from ...models.contract import Axis, StageContract, TensorSpec
from ...models.flamingo_contract import IMAGE_SEQUENCE

# The axis of a cache that grows by concatenation; no contract has it, since callers never see the cache.
PAST = "past_sequence"
# Pictures of a prompt; where a stage has both, IMAGE_SEQUENCE is so many times the latents of one.
IMAGES = "images"
_SYNTAX = (
    "write one profile as --profile 'batch=1,4,8 sequence=1,32,64' (MIN,OPT,MAX per axis; STAGE.AXIS for one stage)"
)


@dataclass(frozen=True)
class ProfileRequest:
    """One `--profile`: axis, or STAGE.AXIS, -> (min, opt, max)."""

    text: str
    ranges: Mapping[str, AxisRange]

    def range_of(self, stage: str, axis: str) -> AxisRange | None:
        """What was asked for an axis of a stage, by its full name first."""
        return self.ranges.get(f"{stage}.{axis}", self.ranges.get(axis))


def parse_profiles(texts: Sequence[str]) -> tuple[ProfileRequest, ...]:
    """The values of `--profile`. InputError for anything that is not the syntax."""
    requests = tuple(_parse_one(text) for text in texts)
    for request in requests[1:]:
        if set(request.ranges) != set(requests[0].ranges):
            first, other = (", ".join(sorted(one.ranges)) for one in (requests[0], request))
            raise InputError(
                f"--profile names {first} once and {other} another time: each --profile is a profile of its own, and "
                f"all must name the same axes; {_SYNTAX}"
            )
    return requests


def _parse_one(text: str) -> ProfileRequest:
    ranges: dict[str, AxisRange] = {}
    for word in text.split():
        match = re.fullmatch(r"((?:[a-z][a-z0-9_]*\.)?[a-z][a-z0-9_]*)=(\d+)(?:,(\d+),(\d+))?", word)
        if match is None:
            raise InputError(f"--profile {text!r}: {word!r} is not AXIS=MIN,OPT,MAX; {_SYNTAX}")
        name, low, best, high = match.groups()
        chosen = (int(low), int(best or low), int(high or low))
        if not chosen[0] <= chosen[1] <= chosen[2] or chosen[2] < 1:
            raise InputError(f"--profile {text!r}: {word!r} needs MIN <= OPT <= MAX and MAX of 1 or more")
        if name in ranges:
            raise InputError(f"--profile {text!r} names {name} twice; {_SYNTAX}")
        ranges[name] = chosen
    if not ranges:
        raise InputError(f"--profile {text!r} names no axis; {_SYNTAX}")
    return ProfileRequest(text, ranges)


def bundle_profiles(manifest: Manifest, texts: Sequence[str] = ()) -> dict[str, tuple[EngineProfile, ...]]:
    """Stage -> its profiles. InputError for an axis that no stage has and for sizes outside of a contract."""
    requests = parse_profiles(texts)
    _check_names(manifest, requests)
    return {stage.contract.name: stage_profiles(stage, manifest, requests) for stage in manifest.stages}


def stage_profiles(
    stage: StageRecord, manifest: Manifest, requests: Sequence[ProfileRequest] = ()
) -> tuple[EngineProfile, ...]:
    """The profiles of one stage, each once. A language model whose cache grows has two for each request."""
    grows = grows_cache(stage, manifest)
    found: list[EngineProfile] = []
    for request in requests or (ProfileRequest("", {}),):
        axes = {axis.name: _range(stage.contract, axis, request) for axis in _input_axes(stage.contract)}
        axes |= _image_tokens(stage.contract, manifest, request)
        for name, ranges in _language_ranges(axes) if grows else [("default", axes)]:
            shapes = {spec.name: _shapes(spec.shape, ranges) for spec in stage_inputs(stage, manifest)}
            profile = EngineProfile(name=name, axes=ranges, shapes=shapes)
            if profile not in found:
                found.append(profile)
    return tuple(found)


def grows_cache(stage: StageRecord, manifest: Manifest) -> bool:
    """Whether the graph takes a cache and gives it back longer."""
    cache = manifest.kv_cache
    return stage.contract.name == "llm" and cache is not None and not cache.shared_buffer


def stage_inputs(stage: StageRecord, manifest: Manifest) -> tuple[TensorSpec, ...]:
    """Inputs of the graph: those of the contract, and of a cache that grows `[batch, heads, past_sequence, size]`."""
    return (*stage.contract.inputs, *_cache_specs(stage, manifest, past=True))


def stage_outputs(stage: StageRecord, manifest: Manifest) -> tuple[TensorSpec, ...]:
    """Outputs of the graph, as `stage_inputs`; the cache has `total_sequence`."""
    return (*stage.contract.outputs, *_cache_specs(stage, manifest, past=False))


def _cache_specs(stage: StageRecord, manifest: Manifest, *, past: bool) -> Iterable[TensorSpec]:
    cache = manifest.kv_cache
    if cache is None or not grows_cache(stage, manifest):
        return
    for layer in range(cache.num_layers):
        for kind in ("key", "value"):
            name = (cache.past if past else cache.present).format(layer=layer, kind=kind)
            length = PAST if past else "total_sequence"
            shape = ("batch", cache.num_heads, length, cache.head_size)
            yield TensorSpec(name=name, dtype=cache.dtype, shape=shape)


def narrow_contract(contract: StageContract, profiles: Sequence[EngineProfile]) -> StageContract:
    """The contract with what the profiles hold together; `opt` is the first one's."""
    axes = tuple(
        _narrow(axis, [one.axes[axis.name] for one in profiles if axis.name in one.axes]) for axis in contract.axes
    )
    return contract.model_copy(update={"axes": axes})


def narrow_generation(manifest: Manifest, stages: Sequence[StageRecord]) -> GenerationContract | None:
    """The manifest's, its context no longer than what `llm` of the narrowed `stages` takes.

    A prompt that is too long is then refused with the counts, before anything runs. A decoder that reads an encoder
    keeps its context: that counts the encoder's tokens.
    """
    generation = manifest.generation
    if generation is None or manifest.seq2seq is not None:
        return generation
    held = [axis.max for one in stages for axis in one.contract.axes if _is_context(one, axis)]
    return generation.model_copy(update={"context_length": min([generation.context_length, *held])})


def _is_context(stage: StageRecord, axis: Axis) -> bool:
    return stage.contract.name == "llm" and axis.name == "total_sequence"


def _narrow(axis: Axis, ranges: list[AxisRange]) -> Axis:
    if not ranges:
        return axis
    bounds = {
        "min": min(low for low, _, _ in ranges),
        "opt": max(1, ranges[0][1]),
        "max": max(one[2] for one in ranges),
    }
    return axis.model_copy(update=bounds)


def _input_axes(contract: StageContract) -> list[Axis]:
    """Axes that an input has; those of outputs alone follow from them."""
    used = {dim for spec in contract.inputs for dim in spec.shape}
    return [axis for axis in contract.axes if axis.name in used]


def _range(contract: StageContract, axis: Axis, request: ProfileRequest) -> AxisRange:
    chosen = request.range_of(contract.name, axis.name)
    if chosen is None:
        return axis.min, axis.opt, axis.max
    if chosen[0] < axis.min or chosen[2] > axis.max:
        asked = ",".join(str(size) for size in chosen)
        raise InputError(
            f"--profile {request.text!r}: {axis.name}={asked} is outside of what stage {contract.name} was exported "
            f"for, {axis.min} to {axis.max}; stay inside, or name the stage that is meant as STAGE.{axis.name}"
        )
    return chosen


def _image_tokens(contract: StageContract, manifest: Manifest, request: ProfileRequest) -> dict[str, AxisRange]:
    """The range of IMAGE_SEQUENCE, which follows from that of the pictures; empty for other models and stages."""
    axes = {axis.name: axis for axis in _input_axes(contract)}
    if manifest.flamingo is None or IMAGE_SEQUENCE not in axes:
        return {}
    asked, images = request.range_of(contract.name, IMAGE_SEQUENCE), request.range_of(contract.name, IMAGES)
    if IMAGES in axes and images is None:
        images = axes[IMAGES].min, axes[IMAGES].opt, axes[IMAGES].max
    if images is None:
        return {}
    latents = manifest.flamingo.latents
    follows = images[0] * latents, images[1] * latents, images[2] * latents
    if asked is not None and asked != follows:
        raise InputError(
            f"--profile {request.text!r}: {IMAGE_SEQUENCE} of stage {contract.name} is {latents} for each picture, "
            f"{','.join(map(str, follows))} here; name {IMAGES} alone"
        )
    return {IMAGE_SEQUENCE: follows}


def _language_ranges(axes: Mapping[str, AxisRange]) -> list[tuple[str, dict[str, AxisRange]]]:
    """Prefill: many tokens and an empty cache. Decode: one token behind what the cache holds."""
    total = axes["total_sequence"]
    tokens = tuple(min(size, total[2]) for size in axes["sequence"])
    low, best, high = (max(1, size - 1) for size in total)
    prefill = {**axes, "sequence": tokens, "total_sequence": tokens, PAST: (0, 0, 0)}
    decode = {**axes, "sequence": (1, 1, 1), "total_sequence": (low + 1, best + 1, high + 1), PAST: (low, best, high)}
    return [("prefill", prefill), ("decode", decode)]  # type: ignore[list-item]


def _shapes(shape: tuple[int | str, ...], ranges: Mapping[str, AxisRange]) -> ShapeRange:
    low, best, high = (tuple(dim if isinstance(dim, int) else ranges[dim][at] for dim in shape) for at in range(3))
    return low, best, high


def _check_names(manifest: Manifest, requests: Sequence[ProfileRequest]) -> None:
    contracts = {stage.contract.name: stage.contract for stage in manifest.stages}
    axes = {name: [axis.name for axis in _input_axes(contract)] for name, contract in contracts.items()}
    known = {axis for names in axes.values() for axis in names}
    known |= {f"{stage}.{axis}" for stage, names in axes.items() for axis in names}
    for request in requests:
        for name in request.ranges:
            if name not in known:
                have = "; ".join(f"{stage}: {', '.join(names)}" for stage, names in axes.items() if names)
                raise InputError(f"--profile {request.text!r}: no stage has the axis {name!r}; there are {have}")
