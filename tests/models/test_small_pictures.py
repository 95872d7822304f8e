"""The picture generator: deterministic, disjoint splits, and what it says is what it shows."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from bridgeport.models.small import checkpoint_path, pictures
from bridgeport.models.small.pictures import COLOR_RGB, Example, generate, held_out
from bridgeport.models.small.scenes import CELLS, COLORS, KINDS, Scene, Shape, sample_questions, sample_scene


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return generate(pictures.TRAIN_SEED, 120)


def test_same_seed_same_pictures(examples: list[Example]) -> None:
    for first, again in zip(examples[:20], generate(pictures.TRAIN_SEED, 20), strict=True):
        assert first.image.tobytes() == again.image.tobytes()
        assert (first.scene, first.questions, first.boxes) == (again.scene, again.questions, again.boxes)
    other = generate(pictures.TRAIN_SEED + 100, 20)
    assert [e.caption for e in other] != [e.caption for e in examples[:20]]


def test_captions_are_the_canonical_ones() -> None:
    """Golden: written by hand from the rules."""
    red, star = Shape("circle", "red", 0), Shape("star", "orange", 3)
    assert Scene((red,), "gray").caption == "a red circle at top left on gray"
    assert Scene((red, star), "black").caption == "a red circle at top left and an orange star at left on black"
    three = Scene((red, star, Shape("cross", "blue", 8)), "white")
    assert three.caption == (
        "a red circle at top left, an orange star at left and a blue cross at bottom right on white"
    )


def test_held_out_scenes_are_never_trained_on() -> None:
    rng = random.Random(0)
    trained = {sample_scene(rng).caption for _ in range(3000)}
    kept = {sample_scene(rng, held_out=True).caption for _ in range(3000)}
    assert not trained & kept
    assert all(example.scene.held_out for example in held_out(50))
    assert not any(example.scene.held_out for example in generate(pictures.TRAIN_SEED, 50))


def test_pictures_vary(examples: list[Example]) -> None:
    assert len({example.image.size for example in examples}) > 10
    assert {example.scene.background for example in examples} == {"white", "gray", "black", "brown"}
    assert {len(example.scene.shapes) for example in examples} == {1, 2, 3}
    shapes = [shape for example in examples for shape in example.scene.shapes]
    assert {shape.kind for shape in shapes} == set(KINDS)
    assert {shape.color for shape in shapes} == set(COLORS)
    assert {shape.cell for shape in shapes} == set(range(9))


def test_mask_and_boxes_say_where_the_shapes_are(examples: list[Example]) -> None:
    for example in examples:
        width, height = example.image.size
        assert example.mask.shape == (height, width)
        pixels = np.asarray(example.image).astype(int)
        for number, (shape, box) in enumerate(zip(example.scene.shapes, example.boxes, strict=True), start=1):
            rows, columns = np.nonzero(example.mask == number)
            assert box[0] <= columns.min() <= columns.max() < box[2] <= width
            assert box[1] <= rows.min() <= rows.max() < box[3] <= height
            row, column = divmod(shape.cell, 3)
            assert int(rows.mean() / height * 3) == row
            assert int(columns.mean() / width * 3) == column
            found = np.median(pixels[rows, columns], axis=0)
            nearest = min(COLOR_RGB, key=lambda name: float(np.abs(found - COLOR_RGB[name]).sum()))
            assert nearest == shape.color


def answer(scene: Scene, question: str) -> str:
    """A second, independent reading of the questions, straight from their words."""
    words = question.rstrip("?").split()
    if question.startswith("how many"):
        return {1: "one", 2: "two", 3: "three"}[len(scene.shapes)]
    if "background" in question:
        return scene.background
    if question.startswith("what color is the"):
        return next(s.color for s in scene.shapes if s.kind == words[-1])
    if question.startswith("where is the"):
        return CELLS[next(s.cell for s in scene.shapes if s.kind == words[-1])]
    if question.startswith("what is at"):
        here = [s for s in scene.shapes if CELLS[s.cell] == " ".join(words[3:])]
        return f"{'an' if here[0].color == 'orange' else 'a'} {here[0].color} {here[0].kind}" if here else "nothing"
    if question.startswith("what is"):
        return "the " + next(s.kind for s in scene.shapes if s.color == words[-1])
    assert question.startswith("is there a")
    return "yes" if any([s.color, s.kind] == words[-2:] for s in scene.shapes) else "no"


def test_answers_are_right_and_unambiguous() -> None:
    rng = random.Random(7)
    answers = []
    for _ in range(800):
        scene = sample_scene(rng)
        for question in sample_questions(scene, rng, 7):
            assert question.answer == answer(scene, question.text), (scene, question)
            assert question.prompt == f"question: {question.text} answer:"
            answers.append(question.answer)
            if question.text.startswith(("what color is the ", "where")) and "background" not in question.text:
                assert [s.kind for s in scene.shapes].count(question.text.rstrip("?").split()[-1]) == 1
    # No constant answer may look clever: yes and no both come up, and no answer is given to a quarter of all.
    assert 0.5 < answers.count("yes") / answers.count("no") < 3
    assert max(map(answers.count, set(answers))) < len(answers) / 4


def test_runs_without_torch() -> None:
    """A board that only runs bundles has Pillow and numpy."""
    program = (
        "import sys; from bridgeport.models.small import checkpoint_path, pictures; pictures.held_out(2);"
        "checkpoint_path(); sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_checkpoint_is_shipped_and_small() -> None:
    assert sum(file.stat().st_size for file in checkpoint_path().iterdir()) <= 8_000_000
