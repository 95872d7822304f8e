"""The shipped small model: greedy tokens are those of `transformers.generate`, picture for picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.runtime.generation import Transformers

from bridgeport.models.small import checkpoint_path
from bridgeport.models.small.pictures import held_out
from bridgeport.runtime import Pipeline

NEW_TOKENS = 40


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_tokens_equal_transformers_on_held_out_pictures(small_bundle: Path, count: int) -> None:
    """A caption of every second picture and an answer about every other, in batches of 1 and of 3."""
    examples = held_out(count)
    images = [example.image for example in examples]
    prompts = [
        "" if i % 2 else example.questions[i % len(example.questions)].prompt for i, example in enumerate(examples)
    ]
    reference = Transformers(checkpoint_path())
    expected = [
        reference.generate([image], [prompt], max_new_tokens=NEW_TOKENS)[0]
        for image, prompt in zip(images, prompts, strict=True)
    ]
    assert len({tuple(row) for row in expected}) > count / 4, "the answers must differ, or a swap is not seen"
    with Pipeline.load(small_bundle, threads=1) as pipeline:
        for size in (1, 3):
            rows = [
                row
                for i in range(0, count, size)
                for row in pipeline.generate(images[i : i + size], prompts[i : i + size], max_new_tokens=NEW_TOKENS)
            ]
            wrong = [i for i, row in enumerate(rows) if list(row.token_ids) != expected[i]]
            assert not wrong, f"batches of {size}: pictures {wrong} differ"
