"""Exact matches on a task, and what a change costs with its paired standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bridgeport.bundle import Bundle
from bridgeport.calibration.data import Sample, open_calibration
from bridgeport.calibration.task import TaskScore, paired_difference, task_accuracy, write_small_data
from bridgeport.errors import InputError
from bridgeport.models.small.pictures import held_out
from bridgeport.runtime import Pipeline

PICTURES = 10


def score(*correct: bool, labels: tuple[str, ...] = ()) -> TaskScore:
    return TaskScore(np.array(correct), labels or ("answer",) * len(correct), ("",) * len(correct))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("task") / "data", PICTURES, held_out=True)


def test_the_paired_standard_error_is_that_of_the_differences() -> None:
    before = score(True, True, True, False, True, True, True, False)
    after = score(True, False, True, True, False, True, False, False)
    # Differences 0 1 0 -1 1 0 1 0: mean 1/4, variance (4 - 8/16) / 7 = 1/2, error sqrt(1/2 / 8) = 1/4.
    assert paired_difference(before, after) == pytest.approx((25.0, 25.0))
    assert paired_difference(after, before) == pytest.approx((-25.0, 25.0))
    # Measured apart, the error would be sqrt(.75 * .25 / 7 + .5 * .5 / 7) = 0.25 too; with pairs that agree it is less.
    agree = paired_difference(score(*[True] * 50, *[False] * 50), score(*[True] * 49, *[False] * 51))
    assert agree == pytest.approx((1.0, 1.0))
    assert agree.standard_error < 100 * math.sqrt(2 * 0.25 / 99) / 5


def test_nothing_changed_and_too_little_to_tell() -> None:
    assert paired_difference(score(True, False), score(True, False)) == (0.0, 0.0)
    assert math.isnan(paired_difference(score(True), score(False)).standard_error)


def test_scores_of_other_items_are_not_compared() -> None:
    with pytest.raises(ValueError, match="of 2 and 1 items"):
        paired_difference(score(True, False), score(True))
    with pytest.raises(ValueError, match="not of the same items"):
        paired_difference(score(True), score(True, labels=("caption",)))
    with pytest.raises(ValueError, match="of 0 and 0 items"):
        paired_difference(score(), score())


def test_the_written_data_is_what_the_generator_drew(data: Path, tmp_path: Path) -> None:
    samples = list(open_calibration(data).samples())
    expected = {("", one.caption) for one in held_out(PICTURES)}
    expected |= {(question.prompt, question.answer) for one in held_out(PICTURES) for question in one.questions}
    assert {(sample.prompt, sample.answer) for sample in samples} == expected
    training = open_calibration(write_small_data(tmp_path / "training", PICTURES))
    assert not {sample.answer for sample in training.samples() if not sample.prompt} & {
        one.caption for one in held_out(PICTURES)
    }
    again = open_calibration(write_small_data(tmp_path / "again", PICTURES, held_out=True))
    assert again.sha256 == open_calibration(data).sha256


def test_accuracy_counts_exact_texts(data: Path, small_bundle: Path) -> None:
    samples = list(open_calibration(data).samples())
    calls: list[tuple[int, int]] = []
    with Pipeline.load(small_bundle, threads=1) as pipeline:
        found = task_accuracy(pipeline, samples, progress=lambda *call: calls.append(call))
        alone = [pipeline.generate(one.picture, one.prompt).text.strip() for one in samples[:6]]
        # Planted faults: an answer that is wrong, one that is only padded, and one that nobody wrote down.
        right = [place for place, correct in enumerate(found.correct) if correct][:3]
        wrong = Sample(samples[right[0]].picture, samples[right[0]].prompt, "nothing of the kind")
        padded = Sample(samples[right[1]].picture, samples[right[1]].prompt, f"  {samples[right[1]].answer}\n")
        silent = Sample(samples[right[2]].picture, samples[right[2]].prompt)
        faults = task_accuracy(pipeline, [wrong, padded, silent], batch_size=1)
    assert list(found.texts[:6]) == alone
    assert found.correct.tolist() == [text == one.answer for text, one in zip(found.texts, samples, strict=True)]
    assert found.labels == tuple("answer" if one.prompt else "caption" for one in samples)
    assert found.accuracy >= 90
    assert len(found.of("caption").correct) == PICTURES
    assert found.of("answer").accuracy == 100 * np.mean(
        [c for c, one in zip(found.correct, samples, strict=True) if one.prompt]
    )
    assert calls[-1] == (len(samples), len(samples))
    assert faults.correct.tolist() == [False, True]
    with pytest.raises(KeyError):
        found.of("score")


def test_a_task_without_answers(data: Path, small_bundle: Path) -> None:
    silent = [Sample(one.picture, one.prompt) for one in open_calibration(data).samples()]
    with pytest.raises(InputError, match=r"no example has an answer to compare with; give some in prompts\.jsonl"):
        task_accuracy(Bundle.load(small_bundle), silent)


@pytest.mark.slow
def test_a_bundle_that_scores_has_no_such_task(data: Path, score_bundle: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="generates none"):
        task_accuracy(Bundle.load(score_bundle("retrieval")), open_calibration(data).samples())
