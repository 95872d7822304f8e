"""The task that a model is for: does it say what it should, and how much of that does a change of the numbers cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import InputError
from ..models.small.pictures import HELD_OUT_SEED, TRAIN_SEED, stream
from ..runtime.pipeline import Pipeline
from .data_pictures import PROMPTS
from .data_types import Sample
from .feed import Progress, source_of

CAPTION, ANSWER = "caption", "answer"


@dataclass(frozen=True)
class TaskScore:
    """Which items of a task came out exactly.

    `correct` bool `[n]`; `labels`: "caption" (an empty prompt) or "answer" per item; `texts`: what the model said.
    """

    correct: NDArray[np.bool_]
    labels: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Percentage of the items that are right."""
        return 100 * float(self.correct.mean())

    def of(self, label: str) -> TaskScore:
        """The items of one label; KeyError when there are none."""
        chosen = [place for place, other in enumerate(self.labels) if other == label]
        if not chosen:
            raise KeyError(label)
        return TaskScore(self.correct[chosen], (label,) * len(chosen), tuple(self.texts[place] for place in chosen))


class PairedDifference(NamedTuple):
    """`points`: percentage points lost (negative: gained). `standard_error`: of the same items' differences, in points.

    It is 0 when no item changed, which does not say that none ever would: with 95 % confidence fewer than `300 / n`
    points of such items change (the rule of three).
    """

    points: float
    standard_error: float


def paired_difference(before: TaskScore, after: TaskScore) -> PairedDifference:
    """What `after` lost against `before` on the same items.

    The error is the deviation (with `n - 1`) of the items' differences by `sqrt(n)`, NaN for one item: items that both
    get right or wrong add nothing, so it is smaller than that of two accuracies measured apart. Raises ValueError for
    scores of different items.
    """
    if before.labels != after.labels or not before.labels:
        raise ValueError(f"scores of {len(before.labels)} and {len(after.labels)} items are not of the same items")
    lost = before.correct.astype(np.float64) - after.correct.astype(np.float64)
    error = float(lost.std(ddof=1)) / math.sqrt(len(lost)) if len(lost) > 1 else math.nan
    return PairedDifference(100 * float(lost.mean()), 100 * error)


def task_accuracy(
    bundle: Bundle | Pipeline,
    examples: Iterable[Sample],
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    threads: int | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> TaskScore:
    """Greedy texts of all `examples` that have an answer, and whether they equal it, white space at both ends aside.

    `examples`: say `data.samples()`; an empty prompt asks for the caption. `max_new_tokens`: None for the bundle's own
    limit. `threads`: per stage, and `engine`: what runs it, None for its own, for a `bundle` that is not loaded yet.
    Raises InputError when no example has an answer, for a bundle that does not generate, and for a bad sample.
    """
    asked = [one for one in examples if one.answer is not None]
    if not asked:
        raise InputError(
            f'no example has an answer to compare with; give some in {PROMPTS}, as {{"image": ..., "prompt": ..., '
            '"answer": ...}'
        )
    if isinstance(bundle, Pipeline):
        texts = list(_answers(bundle, asked, batch_size, max_new_tokens, progress))
    else:
        with Pipeline.load(bundle, threads=threads, engine=engine) as pipeline:
            texts = list(_answers(pipeline, asked, batch_size, max_new_tokens, progress))
    correct = [text == (one.answer or "").strip() for text, one in zip(texts, asked, strict=True)]
    return TaskScore(np.array(correct), tuple(ANSWER if one.prompt else CAPTION for one in asked), tuple(texts))


def _answers(
    pipeline: Pipeline, asked: Sequence[Sample], batch_size: int, limit: int | None, progress: Progress | None
) -> Iterator[str]:
    rows = min(batch_size, pipeline.engines["llm"].contract.axis("batch").max)
    for start in range(0, len(asked), rows):
        batch = asked[start : start + rows]
        pictures = [[source_of(one)] for one in batch]
        for one in pipeline.generate(pictures, [one.prompt for one in batch], max_new_tokens=limit):
            yield one.text.strip()
        if progress is not None:
            progress(start + len(batch), len(asked))


def write_small_data(directory: Path, count: int, *, held_out: bool = False) -> Path:
    """A directory of `count` pictures of the shipped small model, with caption and questions of each; returns it.

    The first of those that it was trained on, or with `held_out` of those on which its figures are measured: no two of
    both sets share a caption.
    """
    directory.mkdir(parents=True, exist_ok=True)
    seed = HELD_OUT_SEED if held_out else TRAIN_SEED
    with (directory / PROMPTS).open("w", encoding="utf-8") as prompts:
        for number, example in enumerate(stream(seed, count, held_out=held_out)):
            name = f"{'held-out' if held_out else 'train'}-{number:05}.png"
            example.image.save(directory / name)
            asked = [("", example.caption), *((one.prompt, one.answer) for one in example.questions)]
            for prompt, answer in asked:
                prompts.write(json.dumps({"image": name, "prompt": prompt, "answer": answer}) + "\n")
    return directory
