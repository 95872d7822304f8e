"""Inputs that each stage takes in a real chain, and what its graph makes of them: what a board is checked against.

Pictures go through the bundle's own processor and graphs by ONNX Runtime, so a quantised graph sees the values that it
was made for; random numbers would saturate it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle import Bundle
from ...engine_record import EngineProfile
from ...errors import InputError
from ...manifest import StageRecord
from .profiles import PAST, grows_cache

Arrays = dict[str, NDArray[Any]]
# Least cosine of the worst token with ONNX Runtime's output of the same graph. What differs is the order of sums
# (FP32), rounding of intermediate values (FP16), and steps of a quantised tensor that either tips over (INT8, FP8).
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.99, "int4": 0.999, "fp8": 0.98}
PICTURES = 2
_PROMPT = "what is this"


@dataclass(frozen=True)
class Case:
    """Inputs and outputs of one run of a graph, and the number of the profile that holds them."""

    profile: int
    inputs: Arrays
    outputs: Arrays


def record_cases(
    bundle: Bundle,
    plans: Mapping[str, tuple[EngineProfile, ...]],
    scratch: Path,
    *,
    pictures: Path | None = None,
    say: Callable[[str], None],
) -> Iterator[tuple[str, list[Case]]]:
    """(stage, its cases), for the first calls of each stage; for a language model a prefill and the step behind it.

    `pictures`: calibration data (see `bridgeport quantize`), None for drawn pictures. `scratch` is an empty folder.
    Raises InputError when no recorded input of a stage lies inside one of its profiles.
    """
    from ...calibration.data import open_calibration
    from ...calibration.feed import feed_stages, with_empty_cache

    say("recording inputs")
    data = open_calibration(
        pictures or _draw_pictures(bundle, scratch), bundle=bundle, seed=0, limit=PICTURES, minimum=1
    )
    names = [stage.contract.name for stage in bundle.manifest.stages]
    feeds: dict[str, list[Arrays]] = {name: [] for name in names}
    for found in feed_stages(bundle, data, names):
        for name, calls in found.items():
            feeds[name] += [dict(call) for call in calls]
    for stage in bundle.manifest.stages:
        name = stage.contract.name
        say(f"{name}: computing expected outputs")
        session = _session(bundle, stage)
        cache = bundle.manifest.kv_cache if grows_cache(stage, bundle.manifest) else None
        cases: list[Case] = []
        for inputs in feeds[name][:PICTURES]:
            cases += _cases(session, stage, plans[name], with_empty_cache(cache, inputs), bundle)
        if not cases:
            raise InputError(_none_fits(stage, plans[name], feeds[name]))
        yield name, cases


def _cases(
    session: Any, stage: StageRecord, profiles: tuple[EngineProfile, ...], inputs: Arrays, bundle: Bundle
) -> list[Case]:
    """The call, and for a language model whose cache grows the step behind it; those that a profile holds."""
    cases = []
    outputs = _run(session, inputs)
    if (number := _profile_of(profiles, inputs)) is not None:
        cases.append(Case(number, inputs, outputs))
    if grows_cache(stage, bundle.manifest):
        step = _next_step(stage, inputs, outputs, bundle)
        if (number := _profile_of(profiles, step)) is not None:
            cases.append(Case(number, step, _run(session, step)))
    return cases


def _next_step(stage: StageRecord, inputs: Arrays, outputs: Arrays, bundle: Bundle) -> Arrays:
    """One more token behind the cache: the last one's embedding again, in the place after it."""
    cache = bundle.manifest.kv_cache
    if cache is None:
        raise InputError(f"{stage.contract.name}: the bundle has no key/value cache; export it again")
    found: Arrays = {}
    for spec in stage.contract.inputs:
        array = inputs[spec.name]
        if "total_sequence" in spec.shape:
            at = spec.shape.index("total_sequence")
            array = np.concatenate([array, np.ones_like(array.take([0], axis=at))], axis=at)
        elif "sequence" in spec.shape:
            array = array.take([-1], axis=spec.shape.index("sequence"))
        found[spec.name] = np.zeros_like(array) if spec.name == "logits_position" else np.ascontiguousarray(array)
    for layer in range(cache.num_layers):
        for kind in ("key", "value"):
            past, present = (name.format(layer=layer, kind=kind) for name in (cache.past, cache.present))
            found[past] = outputs[present]
    return found


def _profile_of(profiles: tuple[EngineProfile, ...], inputs: Arrays) -> int | None:
    shapes = {name: array.shape for name, array in inputs.items()}
    return next((at for at, profile in enumerate(profiles) if profile.holds(shapes) is None), None)


def _none_fits(stage: StageRecord, profiles: tuple[EngineProfile, ...], feeds: list[Arrays]) -> str:
    name = stage.contract.name
    if not feeds:
        return f"the recorded pictures never call the stage {name}; give some that do (videos, say) with --calibration"
    shapes = {key: array.shape for key, array in feeds[0].items()}
    why = profiles[0].holds({key: shape for key, shape in shapes.items() if PAST not in key})
    return (
        f"no recorded input of stage {name} lies inside a profile ({why}); give profiles that hold one picture and a "
        "short prompt, or other pictures with --calibration"
    )


def _session(bundle: Bundle, stage: StageRecord) -> Any:
    from ...runtime.onnxruntime import Device, load_session

    return load_session(bundle.graph(stage.contract.name), Device(), fp8=stage.precision == "fp8")


def _run(session: Any, inputs: Arrays) -> Arrays:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _draw_pictures(bundle: Bundle, scratch: Path) -> Path:
    """Two drawn pictures with a prompt (or texts, for a bundle that scores), as a directory of calibration data."""
    from ...models.small.pictures import held_out

    folder = scratch / "pictures"
    folder.mkdir()
    lines = []
    for number, example in enumerate(held_out(PICTURES)):
        file = f"{number}.png"
        example.image.save(folder / file)
        asked = {"prompt": _PROMPT} if bundle.manifest.score is None else {"texts": [example.caption, _PROMPT]}
        lines.append(json.dumps({"image": file, **asked}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
