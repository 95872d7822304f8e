"""The checkpoint that ships with the package does what its documentation says, with transformers generating."""

from __future__ import annotations

from typing import Any

import pytest

from bridgeport.models.small import checkpoint_path
from bridgeport.models.small.evaluate import load, measure_accuracy, measure_attention
from bridgeport.models.small.pictures import held_out


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load(checkpoint_path())


def test_accuracy_on_a_sample(shipped: tuple[Any, Any]) -> None:
    """The first 60 held-out pictures, 60 captions and 240 answers.

    The limit is the promised 90 % less two standard deviations of such a sample for the captions (sqrt(.9 * .1 / 60)
    = 3.9 points): below it the weights or the pictures have changed. A model that reads no picture gets 0 % captions.
    """
    accuracy = measure_accuracy(*shipped, held_out(60))
    assert accuracy.captions >= 0.82, accuracy.misses
    assert accuracy.answers >= 0.86, accuracy.misses


def test_misses_are_counted(shipped: tuple[Any, Any]) -> None:
    """The planted fault: pictures swapped among captions must score nothing."""
    examples = held_out(12)
    swapped = [type(e)(other.image, e.scene, (), e.mask, e.boxes) for e, other in zip(examples, examples[1:])]  # noqa: B905, RUF007
    accuracy = measure_accuracy(*shipped, [*swapped, examples[0]])
    assert accuracy.captions <= 0.2


def test_queries_look_at_the_shapes(shipped: tuple[Any, Any]) -> None:
    attention = measure_attention(*shipped, held_out(60))
    assert attention.ratio > 1.5, attention


@pytest.mark.slow
def test_accuracy_on_500_held_out_pictures(shipped: tuple[Any, Any]) -> None:
    examples = held_out(500)
    accuracy = measure_accuracy(*shipped, examples)
    assert accuracy.num_captions == 500
    assert accuracy.captions >= 0.90, accuracy.misses
    assert accuracy.answers >= 0.90, accuracy.misses
    assert measure_attention(*shipped, examples).ratio > 1.5
