"""What a quantised bundle must keep before it is written: direction of every token, speed, and the task's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..manifest import Precision
from ..runtime.backends import EngineOptions
from ..runtime.onnxruntime import load_engine
from ..runtime.parity.metrics import Difference, compare
from .data_types import Inputs
from .feed import StageInputs, source_of, with_empty_cache
from .latency import slowdown
from .plan import LOOKUP_STAGES
from .tapped import open_values

if TYPE_CHECKING:
    from ..bundle import Bundle
    from .data_types import Sample
    from .task import TaskScore

# Worst token of pictures that calibration has not seen; docs/quantization.md has the figures behind them. Four bits
# move the logits of one position in a hundred far and most hardly at all: there the limit tells a model from a ruin,
# and the task is the judge.
MIN_COSINE: Mapping[Precision, float] = {"fp32": 0.99999, "fp16": 0.999, "int8": 0.98, "fp8": 0.95, "int4": 0.4}
_NEW_TOKENS = 16


@dataclass(frozen=True)
class GateLimits:
    """`min_cosine`: None for that of the stage's precision in `MIN_COSINE`. `max_slowdown`: time over FP32's.
    `task_drop`: points of exact match, of those that the task's examples can lose.
    """

    min_cosine: float | None = None
    max_slowdown: float = 1.0
    task_drop: float = 1.0

    def __post_init__(self) -> None:
        if self.min_cosine is not None and not -1.0 <= self.min_cosine <= 1.0:
            raise InputError(f"--min-cosine {self.min_cosine} is no cosine; accepted is a number from -1 to 1")
        if not self.max_slowdown > 0:
            raise InputError(f"--max-slowdown {self.max_slowdown}: accepted is a factor above 0 (1.0: not slower)")
        if not 0 <= self.task_drop <= 100:
            raise InputError(f"--task-drop {self.task_drop}: accepted are points from 0 to 100")

    def cosine(self, precision: Precision) -> float:
        """The least cosine that a stage of that precision may have."""
        return MIN_COSINE[precision] if self.min_cosine is None else self.min_cosine


@dataclass(frozen=True)
class StageVerdict:
    """One stage that changed. Times are the least of several rounds in milliseconds, None where they were not taken;
    `slowdown` is the ratio of both. `blame`: the layer at which the error grows most.
    """

    stage: str
    precision: Precision
    min_token_cosine: float
    min_cosine: float
    mean_rel: float
    before_ms: float | None = None
    after_ms: float | None = None
    slowdown: float | None = None
    blame: str | None = None
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskVerdict:
    """Exact matches in percent over `items` questions, and what was lost with its paired standard error, in points."""

    items: int
    before: float
    after: float
    drop: float
    standard_error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether no more was lost than the limit allows."""
        return self.drop <= self.limit

    @property
    def too_coarse(self) -> str:
        """What to say where one answer is more than the limit allows, else nothing."""
        step = 100.0 / self.items
        if not 0 < self.limit < step:
            return ""
        return f", and one answer of {self.items} is {step:.2f}: give more pictures with answers, or raise --task-drop"


@dataclass(frozen=True)
class GateReport:
    """All verdicts. `pictures`: how many the cosines were taken over. `notes`: what was not measured, and why."""

    stages: tuple[StageVerdict, ...]
    pictures: int
    task: TaskVerdict | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def passed(self) -> bool:
        """Whether the bundle may be written."""
        return not any(stage.failures for stage in self.stages) and (self.task is None or self.task.passed)

    def failures(self) -> list[str]:
        """One line for each limit that was missed."""
        lines = [f"{one.stage}: {failure}" for one in self.stages for failure in one.failures]
        if self.task is not None and not self.task.passed:
            lines.append(
                f"task: {self.task.drop:.2f} points lost (standard error {self.task.standard_error:.2f}), the limit is "
                f"{self.task.limit:g}{self.task.too_coarse}"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        task = None if self.task is None else {**asdict(self.task), "passed": self.task.passed}
        return {
            "passed": self.passed,
            "pictures": self.pictures,
            "stages": [asdict(one) for one in self.stages],
            "task": task,
            "notes": list(self.notes),
        }


def stage_differences(
    before: Bundle,
    after: Bundle,
    inputs: Iterable[StageInputs],
    stages: Sequence[str],
    engine: str = "onnxruntime",
) -> dict[str, Difference]:
    """Stage -> the worst difference of its outputs from those of `before` on the same inputs, by the worst token.

    ``inputs``: for each sample, stage -> the inputs of its calls. A stage that was never called is left out.
    ``engine``: what runs `after`. A bundle for another target than the CPU is computed with FP16 rounded and
    overflowing as an accelerator does it, which ONNX Runtime's CPU provider hides.
    """
    worst: dict[str, Difference] = {}
    with ExitStack() as stack:
        pairs = {
            stage: (_runner(before, stage, after, stack, "onnxruntime"), _runner(after, stage, after, stack, engine))
            for stage in stages
        }
        for sample in inputs:
            for stage, (reference, candidate) in pairs.items():
                for call in sample[stage]:
                    expected, actual = reference(call), candidate(call)
                    for name, value in expected.items():
                        found = compare(value, actual[name])
                        if stage not in worst or not found.min_token_cosine >= worst[stage].min_token_cosine:
                            worst[stage] = found
    return worst


def _runner(
    bundle: Bundle, stage: str, after: Bundle, stack: ExitStack, engine: str
) -> Callable[[Inputs], Mapping[str, Any]]:
    """From a stage's inputs to the outputs of its contract."""
    if after.manifest.target == "cpu":
        load = load_engine
        if engine == "openvino":
            from ..runtime.openvino import load_engine as load
        return stack.enter_context(load(bundle, stage, EngineOptions())).run
    names = [spec.name for spec in bundle.manifest.stage(stage).contract.outputs]
    graph = open_values(bundle.graph(stage), names)
    cache = bundle.manifest.kv_cache if stage == "llm" else None
    return lambda inputs: graph(with_empty_cache(cache, inputs))


def judge_stage(
    stage: str,
    precision: Precision,
    difference: Difference,
    timing: tuple[float, float, float] | None,
    limits: GateLimits,
) -> StageVerdict:
    """The verdict over one stage, without its blame."""
    failures = []
    least = limits.cosine(precision)
    # Written so that NaN fails.
    if not difference.min_token_cosine >= least:
        failures.append(f"worst token's cosine {difference.min_token_cosine:.5f}, at least {least:g} is wanted")
    if timing is not None and not timing[2] <= limits.max_slowdown:
        failures.append(
            f"{timing[2]:.2f} x the time of FP32 ({timing[1]:.2f} against {timing[0]:.2f} ms), at most "
            f"{limits.max_slowdown:g} x is wanted"
        )
    return StageVerdict(
        stage,
        precision,
        difference.min_token_cosine,
        least,
        difference.mean_rel,
        None if timing is None else timing[0],
        None if timing is None else timing[1],
        None if timing is None else timing[2],
        failures=tuple(failures),
    )


def time_bundles(
    before: Bundle, after: Bundle, sample: Sample, engine: str = "onnxruntime"
) -> dict[str, tuple[float, float, float]]:
    """Stage -> (milliseconds before, after, ratio) on one picture; `llm` is prefill and decode together.

    ``engine``: what runs `after`.
    """
    if before.manifest.score is not None:
        return _time_scores(before, after, sample)
    from ..runtime.pipeline import Pipeline

    def timed(pipeline: Pipeline) -> Mapping[str, float]:
        source = source_of(sample)
        answer = pipeline.generate([[source]], [sample.prompt], max_new_tokens=_NEW_TOKENS, ignore_eos=True)[0]
        times = answer.timings_ms
        return {
            "encoder": times["encoder"],
            "connector": times["connector"],
            "llm": times["prefill"] + times["decode"],
            "total": times["total"],
        }

    with Pipeline.load(before) as one, Pipeline.load(after, engine=engine) as two:
        return slowdown(lambda: timed(one), lambda: timed(two))


def _time_scores(before: Bundle, after: Bundle, sample: Sample) -> dict[str, tuple[float, float, float]]:
    from ..runtime.score import Scorer

    if sample.picture is None:
        return {}
    picture, texts = sample.picture, list(sample.texts) or ["a picture of a red circle", "a photo of a street"]
    with Scorer.load(before) as one, Scorer.load(after) as two:
        return slowdown(lambda: one.score(picture, texts).timings_ms, lambda: two.score(picture, texts).timings_ms)


def judge_task(before: TaskScore, after: TaskScore, limit: float) -> TaskVerdict:
    """What the quantised bundle lost of the task, over the same examples."""
    from .task import paired_difference

    lost = paired_difference(before, after)
    return TaskVerdict(len(before.correct), before.accuracy, after.accuracy, lost.points, lost.standard_error, limit)


def changed_stages(before: Bundle, after: Bundle) -> list[str]:
    """The stages that are not what they were, except tables of embeddings, which compute nothing."""
    was = {stage.contract.name: stage for stage in before.manifest.stages}
    return [
        stage.contract.name
        for stage in after.manifest.stages
        if stage != was[stage.contract.name] and stage.contract.name not in LOOKUP_STAGES
    ]
