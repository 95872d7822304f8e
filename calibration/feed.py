"""What each stage of a bundle takes for calibration data: real activations, from running the stages before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import InputError
from ..models.contract import KvCacheContract
from ..runtime.backends import EngineOptions
from ..runtime.engine import Arrays, Call, Engine
from ..runtime.kv_cache import HostBuffer, KvCache
from ..runtime.onnxruntime import load_engine
from ..runtime.pipeline import Pipeline
from ..runtime.score import Scorer
from ..runtime.sources import Video
from .data_types import CalibrationData, Inputs, Sample

Progress = Callable[[int, int], None]
StageInputs = dict[str, tuple[Inputs, ...]]
# Stage -> the stages whose outputs it reads, in the order in which a chain calls them. A stage that none of the wanted
# ones reads is not loaded.
READS: dict[str, tuple[str, ...]] = {
    "encoder": (),
    "connector": ("encoder",),
    "video_connector": ("encoder",),
    "embed_tokens": (),
    "cross_kv": ("connector", "video_connector"),
    "llm_encoder": ("connector", "video_connector", "embed_tokens"),
    "llm": ("connector", "video_connector", "embed_tokens", "cross_kv", "llm_encoder"),
    "text_encoder": (),
    "matcher": ("encoder",),
}
_ORDER = tuple(READS)
_OF_PICTURES = ("encoder", "connector", "video_connector", "cross_kv")


def stage_inputs(
    bundle: Bundle,
    data: CalibrationData,
    stage: str,
    *,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Iterator[dict[str, NDArray[Any]]]:
    """The inputs of `stage`, one set per call of it, in the order of `data`; for `llm` those of the prefill.

    See `feed_stages`, which this is for one stage.
    """
    for found in feed_stages(bundle, data, [stage], progress=progress, threads=threads):
        for inputs in found[stage]:
            yield dict(inputs)


def feed_stages(
    bundle: Bundle,
    data: CalibrationData,
    stages: Sequence[str],
    *,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Iterator[StageInputs]:
    """For each sample, stage -> its inputs, from one pass over the pictures.

    Every sample goes alone through the bundle's processor and as far as the last of `stages`, by ONNX Runtime on the
    CPU; only stages that those read are loaded, and one sample's tensors are in memory. A stage has as many entries as
    the chain calls it: none where it had no part (another prompt about the same picture calls no vision stage anew,
    pictures do not call `video_connector`), several where a picture needs more than one batch.
    `progress(done, total)` counts samples. `threads`: per stage, None for all cores.

    Raises InputError for a stage that the bundle has not, for a sample that it cannot take (named by its number), and
    for tensors of other stages alone; EngineError when a stage fails.
    """
    known = [stage.contract.name for stage in bundle.manifest.stages]
    for stage in stages:
        if stage not in known:
            raise InputError(f"{bundle.path} has no stage {stage!r}; it has {', '.join(known)}")
    tapped = _TappedChain(bundle, tuple(dict.fromkeys(stages)), EngineOptions(threads=threads))
    try:
        for number, sample in enumerate(data.samples(), start=1):
            try:
                found = tapped.run(sample)
            except InputError as error:
                raise InputError(f"{data.name}, sample {number}: {error}") from error
            yield found
            if progress is not None:
                progress(number, len(data))
    finally:
        tapped.close()


def with_empty_cache(contract: KvCacheContract | None, inputs: Inputs) -> dict[str, NDArray[Any]]:
    """`inputs` of `llm`, and the cache of a prefill, for a session that takes the graph's inputs by their names.

    A shared cache is `[B, heads, total_sequence, head_size]` of zeros, any other holds no token yet. With None for
    `contract` (every other stage) nothing is added.
    """
    found = dict(inputs)
    if contract is None:
        return found
    batch, length = inputs["attention_mask"].shape
    cache = KvCache.allocate(contract, batch, length if contract.shared_buffer else 0)
    for past, _, buffer in cache.bindings():
        if isinstance(buffer, HostBuffer):
            found[past] = buffer.array
    return found


class _ReachedError(Exception):
    """No wanted stage is left on the way."""


class _Tap(Engine):
    """Stands in a chain for one stage: notes what comes, and computes only what a wanted stage reads."""

    def __init__(self, bundle: Bundle, stage: str, wanted: Sequence[str], options: EngineOptions) -> None:
        kv_cache = bundle.manifest.kv_cache if stage == "llm" else None
        super().__init__(bundle.manifest.stage(stage).contract, kv_cache)
        self.seen: list[Inputs] = []
        self._load = partial(load_engine, bundle, stage, options)
        self._wanted = stage in wanted
        self._is_read = stage in _all_read(wanted)
        last = max(_ORDER.index(name) for name in wanted)
        self._is_end = _ORDER.index(stage) > last or (stage == "llm" and not self._is_read)
        self._engine: Engine | None = None
        self._last: tuple[Inputs, Inputs] | None = None

    def compute(self, inputs: Inputs) -> dict[str, NDArray[Any]]:
        """The stage's outputs; those of its last call where the same inputs come again."""
        if self._last is None or not _equal(self._last[0], inputs):
            self._engine = self._engine or self._load()
            copies = {name: array.copy() for name, array in inputs.items()}
            self._last = copies, self._engine.run(inputs)
        return {name: array.copy() for name, array in self._last[1].items()}

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._last = None

    def _bind(self, inputs: Arrays, outputs: Arrays, cache: KvCache | None) -> Call:
        def call() -> None:
            if self._wanted:
                self.seen.append({name: array.copy() for name, array in inputs.items()})
            if self._is_end:
                raise _ReachedError
            computed = self.compute(inputs) if self._is_read else {}
            for name, array in outputs.items():
                array[...] = computed.get(name, 0)

        return call


def _all_read(stages: Sequence[str]) -> set[str]:
    """Every stage that has to run before all of `stages` have their inputs."""
    found: set[str] = set()
    waiting = list(stages)
    while waiting:
        new = set(READS[waiting.pop()]) - found
        found |= new
        waiting += sorted(new)
    return found


def _equal(one: Inputs, other: Inputs) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


class _TappedChain:
    """A pipeline, or a scorer, over taps."""

    def __init__(self, bundle: Bundle, stages: tuple[str, ...], options: EngineOptions) -> None:
        self.manifest = bundle.manifest
        self.stages = stages
        self.taps = {
            stage.contract.name: _Tap(bundle, stage.contract.name, stages, options) for stage in self.manifest.stages
        }
        engines: dict[str, Engine] = dict(self.taps)
        score = self.manifest.score
        self._scorer = None if score is None else Scorer(bundle, engines, score)
        self._pipeline = Pipeline(bundle, engines, options) if score is None else None
        prompt = self.manifest.prompt
        self._instructed = prompt is not None and prompt.instruction is not None
        self._before: Sample | None = None

    def run(self, sample: Sample) -> StageInputs:
        """The inputs of each stage for `sample`."""
        if sample.tensors is not None:
            return {stage: (self._given(sample.tensors, stage),) for stage in self.stages}
        for tap in self.taps.values():
            tap.seen = []
        repeated = self._before is not None and self._before.picture == sample.picture
        skipped = {stage for stage in self.stages if repeated and self._of_picture_alone(stage)}
        if skipped != set(self.stages):
            with suppress(_ReachedError):
                self._call(sample)
        self._before = sample
        return {stage: () if stage in skipped else tuple(self.taps[stage].seen) for stage in self.stages}

    def close(self) -> None:
        """Free what was loaded."""
        for tap in self.taps.values():
            tap.close()

    def _of_picture_alone(self, stage: str) -> bool:
        reads_prompt = self._instructed and stage not in ("encoder", "cross_kv")
        return stage in _OF_PICTURES and not reads_prompt

    def _call(self, sample: Sample) -> None:
        if self._pipeline is not None:
            self._pipeline.generate(source_of(sample), sample.prompt, max_new_tokens=1)
        elif self._scorer is not None and sample.picture is not None:
            self._scorer.score(sample.picture, self._texts(sample))

    def _texts(self, sample: Sample) -> Sequence[str]:
        texts = sample.texts or tuple(text for text in (sample.prompt, sample.answer) if text)[:1]
        if not texts and {"text_encoder", "matcher"} & set(self.stages):
            raise InputError(
                f"{sample.picture} has no text to compare it with; give it some in prompts.jsonl, as "
                '{"image": ..., "texts": [...]}'
            )
        return texts or ("-",)  # no wanted stage reads it

    def _given(self, tensors: Mapping[str, Inputs], stage: str) -> Inputs:
        """The inputs of `stage` as the file has them, or the connector's from the encoder's."""
        if stage in tensors:
            return tensors[stage]
        names = [spec.name for spec in self.taps[stage].contract.inputs]
        if READS[stage] == ("encoder",) and "encoder" in tensors:
            outputs = {**tensors["encoder"], **self.taps["encoder"].compute(tensors["encoder"])}
            if set(names) <= set(outputs):
                return {name: outputs[name] for name in names}
        raise InputError(
            f"the tensors are inputs of {', '.join(tensors)} alone, and {stage} takes {', '.join(names)}; add "
            f"{stage}/{names[0]} and so on, or calibrate with pictures"
        )


def source_of(sample: Sample) -> Any:
    """What `Pipeline.generate` takes for the sample's picture or video."""
    return Video(sample.picture) if sample.video and sample.picture is not None else sample.picture
