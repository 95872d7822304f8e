"""Which drill fits the stage that diverged, and what it is fed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BridgeportError
from ...manifest import ImageStep, Manifest, Normalize, Rescale, Resize
from ..processor import load_image, preprocess_image
from ..processor.image import FILTERS
from ..sources import Video
from .drill import DrillReport, Step, drill_graph
from .gates import FP32, FP32_LOGITS, PIXELS, STAGES
from .metrics import compare, compare_ids
from .names import find_probes

if TYPE_CHECKING:
    from ...bundle import Bundle
    from .reference import Reference, ReferenceValues
    from .report import Finding
    from .stages import BundleStages, Case

# What counts as a departure whatever came before it.
DRILL_GATES = {"first_logits": FP32_LOGITS, "tokens": FP32_LOGITS}
Feeds = dict[str, NDArray[Any]]


def drill_into(
    stage: str,
    bundle: Bundle,
    stages: BundleStages,
    reference: Reference,
    case: Case,
    values: ReferenceValues,
    findings: tuple[Finding, ...] = (),
) -> DrillReport:
    """Find, for one case, where inside `stage` the bundle departs from PyTorch.

    `findings`: what reading the stage's graph showed. A quantised stage is held against a `reference` that has
    the bundle's weights (`Reference.use_weights_of`), with the precision of FP32.
    """
    if stage == "pixels":
        return drill_pixels(bundle.manifest, reference, case)
    if stage == "placeholder_ids":
        return drill_prompt(bundle.manifest, stages, reference, case, values)
    if stage in ("first_logits", "tokens") and not prompt_alone(bundle.manifest):
        note = "a language model that takes more than its prompt's embeddings is compared at its ends only"
        return DrillReport(stage, None, None, 0, note=note)
    entry = next(entry for entry in STAGES if entry.name == stage)
    computed_by = entry.computed_by or ""
    if stage == "connector" and isinstance(case.image, Video) and "video_connector" in stages.names:
        computed_by = "video_connector"
    feeds = _feeds(stage, bundle.manifest, reference, values)
    if stage == "connector":
        feeds = {**stages.prepare([case])[0].tensors, **feeds}
    found = drill_graph(
        stage,
        bundle.graph(computed_by),
        lambda graph: find_probes(computed_by, graph, bundle.manifest, reference),
        feeds,
        reference.model,
        _reference_run(stage, reference, case, feeds),
        DRILL_GATES.get(stage, FP32),
        findings,
    )
    if stage == "merged_embeddings" and found.departure is None:
        return replace(found, note="the token embeddings equal PyTorch's, so the merge puts features elsewhere")
    return found


def _feeds(stage: str, manifest: Manifest, reference: Reference, values: ReferenceValues) -> Feeds:
    """The graph's inputs for one row, as PyTorch has them."""
    if stage == "encoder":
        return {"pixel_values": values.pixel_values}
    if stage == "connector":
        return {"image_embeds": values.image_embeds}
    if stage == "merged_embeddings":
        return {"input_ids": np.array([values.input_ids], np.int64)}
    inputs_embeds = values.inputs_embeds
    if stage == "tokens":
        inputs_embeds = np.concatenate([inputs_embeds, reference.embed(values.token_ids[:-1])])
    return llm_feeds(manifest, inputs_embeds)


def prompt_alone(manifest: Manifest) -> bool:
    """Whether the language model takes the prompt's embeddings and nothing beside them (an encoder's output, M-RoPE's
    positions, latents of pictures), so that it can be run by itself.
    """
    names = {spec.name for spec in manifest.stage("llm").contract.inputs}
    return names == {"inputs_embeds", "attention_mask", "logits_position"}


def llm_feeds(manifest: Manifest, inputs_embeds: NDArray[Any]) -> Feeds:
    """Inputs of the decoder for a prefill of one row `[S, D]`, its cache empty."""
    return {
        "inputs_embeds": inputs_embeds[None],
        "attention_mask": np.ones((1, len(inputs_embeds)), np.int64),
        "logits_position": np.array([len(inputs_embeds) - 1], np.int64),
        **_empty_cache(manifest),
    }


def _empty_cache(manifest: Manifest) -> Feeds:
    cache = manifest.kv_cache
    if cache is None:
        return {}
    empty = np.zeros((1, cache.num_heads, 0, cache.head_size), cache.dtype)
    return {
        cache.past.format(layer=layer, kind=kind): empty
        for layer in range(cache.num_layers)
        for kind in ("key", "value")
    }


def _reference_run(stage: str, reference: Reference, case: Case, feeds: Feeds) -> Callable[[], object]:
    if stage == "tokens":
        return lambda: reference.first_logits(feeds["inputs_embeds"][0])
    return lambda: reference.forward(case.image, case.prompt)


def drill_pixels(manifest: Manifest, reference: Reference, case: Case) -> DrillReport:
    """The first preprocessing step after which the picture is not the checkpoint's own processor's."""
    if manifest.image.tiling.kind != "whole" or isinstance(case.image, list | Video):
        return DrillReport("pixels", None, None, 0, note="a picture that is cut into tiles is compared as a whole only")
    steps = manifest.image.steps
    before: Step | None = None
    for count in range(len(steps) + 1):
        done = steps[:count]
        ours = preprocess_image(load_image(case.image), done)
        theirs = reference.preprocess(case.image, only={step.op for step in done})
        name = done[-1].op if done else "convert_rgb"
        where = f"{type(reference.processor.image_processor).__name__}, {name}"
        step = Step(name, "Preprocessing", f"picture after {name}", where, compare(theirs, ours))
        if PIXELS.broken(step.difference):
            cause = _step_cause(done[-1], reference.processor.image_processor) if done else ()
            return DrillReport("pixels", step, before, count + 1, cause)
        before = step
    return DrillReport("pixels", None, before, len(steps) + 1, note="every step equals the checkpoint's processor")


def _step_cause(step: ImageStep, processor: Any) -> tuple[str, ...]:
    """Where the step's settings are not those of the checkpoint's processor."""
    pairs: list[tuple[str, object, object]]
    if isinstance(step, Resize):
        filters = {int(value): name for name, value in FILTERS.items()}
        theirs = filters.get(int(processor.resample), str(processor.resample))
        size = [processor.size["height"], processor.size["width"]]
        pairs = [("resample", step.resample, theirs), ("size", [step.height, step.width], size)]
    elif isinstance(step, Rescale):
        pairs = [("factor", step.factor, processor.rescale_factor)]
    elif not isinstance(step, Normalize):
        return ()
    else:
        pairs = [
            ("mean", list(step.mean), list(processor.image_mean)),
            ("std", list(step.std), list(processor.image_std)),
        ]
    return tuple(
        f"{name} is {ours}, the checkpoint's processor has {theirs}" for name, ours, theirs in pairs if ours != theirs
    )


def drill_prompt(
    manifest: Manifest, stages: BundleStages, reference: Reference, case: Case, values: ReferenceValues
) -> DrillReport:
    """What is different about the token ids: placeholders first, then the first id that is not PyTorch's."""
    try:
        prompt = stages.prompts([case.prompt], stages.prepare([case]))[0]
    except BridgeportError as error:
        return DrillReport("placeholder_ids", None, None, 0, note=str(error))
    positions = prompt.image_positions
    difference = compare_ids(values.input_ids, prompt.input_ids)
    causes = []
    if len(positions) != len(values.image_positions):
        causes.append(f"{len(positions)} image placeholders, PyTorch has {len(values.image_positions)}")
    if positions[:1] != values.image_positions[:1]:
        causes.append(f"the placeholders begin at {positions[:1]}, in PyTorch at {values.image_positions[:1]}")
    at = difference.where[0] if difference.where else 0
    pieces = [_piece(reference, ids, at) for ids in (prompt.input_ids, values.input_ids)]
    if difference.where:
        causes.append(f"position {at} holds {pieces[0]}, PyTorch has {pieces[1]}")
    segments = " + ".join(segment.kind for segment in manifest.prompt.segments) if manifest.prompt else ""
    step = Step(f"position {at}", "Tokenize", segments, type(reference.processor).__name__, difference)
    return DrillReport("placeholder_ids", step, None, len(values.input_ids), tuple(causes))


def _piece(reference: Reference, ids: list[int], at: int) -> str:
    if at >= len(ids):
        return "nothing"
    return f"{ids[at]} ({reference.processor.tokenizer.convert_ids_to_tokens(ids[at])!r})"
