"""Sampling against transformers' logits processors, which define it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bridgeport.errors import EngineError, InputError
from bridgeport.runtime.sampling import Sampler, SamplingParams, draw

VOCAB = 97
PROMPT = [3, 3, 40, 96]


def make_sampler(params: SamplingParams, *, vocab: int = VOCAB) -> Sampler:
    return Sampler(params, PROMPT, vocab, params.generator(0, 1))


def make_logits(seed: int) -> Any:
    return np.random.default_rng(seed).normal(0, 4, VOCAB).astype(np.float32)


def transformers_scores(params: SamplingParams, logits: Any) -> Any:
    """The processors that `generate(do_sample=True)` builds, in its order."""
    processors: list[Any] = []
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature is not None and params.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None and params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    scores = torch.from_numpy(logits)[None]
    for processor in processors:
        scores = processor(torch.tensor([PROMPT]), scores)
    return scores[0].numpy()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.2},
        {"top_p": 0.9},
        {"top_p": 1e-4},
        {"temperature": 1.0, "repetition_penalty": 1.7},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.8, "repetition_penalty": 0.6},
    ],
    ids=str,
)
def test_scores_are_those_of_transformers(options: dict[str, Any], seed: int) -> None:
    params = SamplingParams(**options)
    logits = make_logits(seed)
    ours, theirs = make_sampler(params).process(logits), transformers_scores(params, logits)
    assert np.array_equal(np.isinf(ours), np.isinf(theirs))
    # One rounding in FP32 per processor on values below 20: 1e-5; the next filter step would differ by far more.
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-5)


def test_the_order_of_processors_matters_here() -> None:
    """The comparison above would see a swap of temperature and top-p: the kept sets differ."""
    logits = make_logits(0)
    hot = SamplingParams(temperature=3.0, top_p=0.8)
    swapped = transformers_scores(SamplingParams(top_p=0.8), logits)
    assert np.isinf(make_sampler(hot).process(logits)).sum() < np.isinf(swapped).sum()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0, "top_k": 3, "top_p": 0.5}], ids=str)
def test_greedy_takes_the_first_best_token(options: dict[str, Any]) -> None:
    logits = make_logits(1)
    logits[[20, 50]] = logits.max() + 1
    before = logits.copy()
    assert make_sampler(SamplingParams(**options)).choose(logits) == 20
    assert np.array_equal(logits, before)


def test_the_penalty_counts_prompt_and_answer() -> None:
    sampler = make_sampler(SamplingParams(repetition_penalty=4.0))
    logits = np.zeros(VOCAB, np.float32)
    logits[[40, 7, 8]] = 3.0, 2.0, 1.0
    assert [sampler.choose(logits) for _ in range(3)] == [7, 8, 40]  # 40 stands in the prompt


def test_draws_follow_the_probabilities() -> None:
    scores = np.log(np.array([0.5, 0.0, 0.3, 0.2], np.float64) + 1e-300).astype(np.float32)
    scores[1] = -np.inf
    generator = np.random.default_rng(5)
    counts = np.bincount([draw(scores, generator) for _ in range(4000)], minlength=4)
    assert counts[1] == 0
    # Four standard deviations of a binomial of 4000; a uniform choice would be off by 660.
    np.testing.assert_allclose(counts, [2000, 0, 1200, 800], rtol=0, atol=4 * 32)


def test_seeds_repeat_and_differ() -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = make_sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.choose(np.zeros(VOCAB, np.float32)) for _ in range(12)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)


def test_top_k_or_top_p_alone_samples() -> None:
    assert SamplingParams().effective_temperature == 0.0
    assert SamplingParams(top_k=0).effective_temperature == 0.0
    assert SamplingParams(top_k=3).effective_temperature == 1.0
    assert SamplingParams(top_p=1.0).effective_temperature == 1.0
    assert SamplingParams(top_k=3, temperature=0).effective_temperature == 0.0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"seed": [1, "x"]},
        {"stop_token_ids": [-3]},
    ],
    ids=str,
)
def test_bad_values_are_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=rf"^{name} is .*; accepted is "):
        SamplingParams(**options)


def test_one_seed_per_row_must_be_one_per_row() -> None:
    params = SamplingParams(seed=[1, 2])
    assert params.generator(0, 2).random() != params.generator(1, 2).random()
    with pytest.raises(InputError, match="seed has 2 values for 3 rows"):
        params.generator(0, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"top_p": 0.9}], ids=str)
def test_nan_and_infinite_logits_are_an_error(options: dict[str, Any], value: float) -> None:
    logits = make_logits(0)
    logits[11] = value
    with pytest.raises(EngineError, match=r"llm gave (nan|inf) logits"):
        make_sampler(SamplingParams(**options)).choose(logits)
