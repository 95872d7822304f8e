"""What a picture of the small model's world shows, and what can be said and asked about it.

One to three coloured shapes on a 3 x 3 grid of cells, on a background. Everything is derived from a scene in
one canonical way (shapes in reading order), so that "exactly right" is well defined for captions and answers.
Pure Python: no picture, no tensor.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

KINDS = ("circle", "square", "triangle", "star", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
BACKGROUNDS = ("white", "gray", "black", "brown")
CELLS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
COUNTS = ("one", "two", "three")
NOTHING = "nothing"


@dataclass(frozen=True)
class Shape:
    """One coloured shape; ``cell`` indexes :data:`CELLS` (reading order)."""

    kind: str
    color: str
    cell: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """One to three shapes in reading order, no two in one cell, on a background."""

    shapes: tuple[Shape, ...]
    background: str

    @property
    def caption(self) -> str:
        """E.g. ``a red circle at top left, an orange star at left and a blue cross at center on gray``."""
        parts = [f"{article(s.color)} {s.name} at {CELLS[s.cell]}" for s in self.shapes]
        head = ", ".join(parts[:-1])
        shapes = f"{head} and {parts[-1]}" if head else parts[-1]
        return f"{shapes} on {self.background}"

    @property
    def held_out(self) -> bool:
        """Whether this scene is kept from training: one in eight, by its caption's CRC-32."""
        return zlib.crc32(self.caption.encode()) % 8 == 0


@dataclass(frozen=True)
class Question:
    """A question and its one right answer."""

    text: str
    answer: str

    @property
    def prompt(self) -> str:
        """BLIP-2's prompt for visual question answering."""
        return f"question: {self.text} answer:"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def sample_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """Draw a scene from the training or from the held-out part, which share no caption."""
    while True:
        cells = sorted(rng.sample(range(len(CELLS)), rng.choice((1, 2, 3))))
        shapes = tuple(Shape(rng.choice(KINDS), rng.choice(COLORS), cell) for cell in cells)
        scene = Scene(shapes, rng.choice(BACKGROUNDS))
        if scene.held_out == held_out:
            return scene


def sample_questions(scene: Scene, rng: random.Random, count: int) -> tuple[Question, ...]:
    """``count`` questions of different families (fewer if the scene allows fewer)."""
    families = (_count, _background, _color_of, _kind_of, _where, _what_at, _is_there)
    found: list[Question] = []
    for family in rng.sample(families, len(families)):
        question = family(scene, rng)
        if question is not None:
            found.append(question)
        if len(found) == count:
            break
    return tuple(found)


def _count(scene: Scene, rng: random.Random) -> Question:
    return Question("how many shapes are there?", COUNTS[len(scene.shapes) - 1])


def _background(scene: Scene, rng: random.Random) -> Question:
    return Question("what color is the background?", scene.background)


def _alone(scene: Scene, rng: random.Random, attribute: str) -> Shape | None:
    """A shape whose kind (or color) no other shape has, so that naming it is unambiguous."""
    values = [getattr(shape, attribute) for shape in scene.shapes]
    alone = [shape for shape, value in zip(scene.shapes, values, strict=True) if values.count(value) == 1]
    return rng.choice(alone) if alone else None


def _color_of(scene: Scene, rng: random.Random) -> Question | None:
    shape = _alone(scene, rng, "kind")
    return None if shape is None else Question(f"what color is the {shape.kind}?", shape.color)


def _kind_of(scene: Scene, rng: random.Random) -> Question | None:
    shape = _alone(scene, rng, "color")
    return None if shape is None else Question(f"what is {shape.color}?", f"the {shape.kind}")


def _where(scene: Scene, rng: random.Random) -> Question | None:
    shape = _alone(scene, rng, "kind")
    return None if shape is None else Question(f"where is the {shape.kind}?", CELLS[shape.cell])


def _what_at(scene: Scene, rng: random.Random) -> Question:
    """Three times in four about a cell with a shape in it, else about an empty one."""
    there = {shape.cell: shape for shape in scene.shapes}
    if rng.random() < 0.75:
        cell = rng.choice(sorted(there))
        shape = there[cell]
        return Question(f"what is at {CELLS[cell]}?", f"{article(shape.color)} {shape.name}")
    cell = rng.choice([c for c in range(len(CELLS)) if c not in there])
    return Question(f"what is at {CELLS[cell]}?", NOTHING)


def _is_there(scene: Scene, rng: random.Random) -> Question:
    """Half of the time yes; a no differs from a shape that is there in its kind or in its color."""
    shape = rng.choice(scene.shapes)
    kind, color = shape.kind, shape.color
    if rng.random() < 0.5:
        kind, color = (rng.choice(KINDS), color) if rng.random() < 0.5 else (kind, rng.choice(COLORS))
    present = any((s.kind, s.color) == (kind, color) for s in scene.shapes)
    return Question(f"is there {article(color)} {color} {kind}?", "yes" if present else "no")
