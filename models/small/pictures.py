"""Pictures of scenes, drawn with Pillow: sizes, aspects, backgrounds and colours vary, all from one seed.

Needs Pillow and numpy alone (it runs on a board without torch).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from .scenes import Question, Scene, Shape, sample_questions, sample_scene

TRAIN_SEED = 1
HELD_OUT_SEED = 2
QUESTIONS_PER_PICTURE = 4
SIDES = (96, 120, 144, 160, 192, 224)
# Wider than 4:3 would make circles look like other things once the processor has squeezed them to a square.
MAX_ASPECT = 4 / 3
SUPERSAMPLE = 3

COLOR_RGB = {
    "red": (214, 32, 36),
    "green": (38, 160, 62),
    "blue": (38, 74, 214),
    "yellow": (242, 222, 40),
    "purple": (140, 44, 168),
    "orange": (244, 136, 24),
}
BACKGROUND_RGB = {
    "white": (240, 240, 238),
    "gray": (132, 134, 138),
    "black": (22, 22, 26),
    "brown": (104, 68, 42),
}


@dataclass(frozen=True)
class Example:
    """One picture with all that is true of it.

    ``mask``: uint8 ``[H, W]``, 0 for background, ``i + 1`` for the i-th shape of the scene.
    ``boxes``: per shape ``(left, top, right, bottom)`` in pixels, right and bottom exclusive.
    """

    image: Image.Image
    scene: Scene
    questions: tuple[Question, ...]
    mask: npt.NDArray[np.uint8]
    boxes: tuple[tuple[int, int, int, int], ...]

    @property
    def caption(self) -> str:
        return self.scene.caption


def generate(seed: int, count: int, *, held_out: bool = False) -> list[Example]:
    """``count`` examples; the first ones of a longer list are the same, and no two splits share a caption."""
    return list(stream(seed, count, held_out=held_out))


def held_out(count: int) -> list[Example]:
    """The held-out pictures on which every figure of the small model is measured."""
    return generate(HELD_OUT_SEED, count, held_out=True)


def stream(seed: int, count: int, *, held_out: bool = False) -> Iterator[Example]:
    """As :func:`generate`, one at a time."""
    for index in range(count):
        rng = random.Random(f"{seed}:{index}")
        yield draw(sample_scene(rng, held_out=held_out), rng)


def draw(scene: Scene, rng: random.Random) -> Example:
    """Draw a scene with a random size, texture, place in its cell, tilt and tint."""
    width = rng.choice(SIDES)
    height = rng.choice([side for side in SIDES if max(side / width, width / side) <= MAX_ASPECT])
    image = _background(scene.background, width, height, rng)
    mask = np.zeros((height, width), np.uint8)
    boxes = []
    for number, shape in enumerate(scene.shapes, start=1):
        stencil, left, top = _stencil(shape, width, height, rng)
        image.paste(_tint(COLOR_RGB[shape.color], 14, rng), (left, top), stencil)
        covered = np.asarray(stencil) >= 128
        mask[top : top + stencil.height, left : left + stencil.width][covered] = number
        boxes.append((left, top, left + stencil.width, top + stencil.height))
    return Example(image, scene, sample_questions(scene, rng, QUESTIONS_PER_PICTURE), mask, tuple(boxes))


def _tint(rgb: tuple[int, int, int], spread: int, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in rgb)
    return red, green, blue


def _background(name: str, width: int, height: int, rng: random.Random) -> Image.Image:
    """Plain, a gradient, noise or stripes, in one of four tones."""
    base = np.array(_tint(BACKGROUND_RGB[name], 8, rng), np.float32)
    style = rng.choice(("plain", "gradient", "noise", "stripes"))
    texture = np.zeros((height, width, 1), np.float32)
    if style == "gradient":
        ramp = np.linspace(-14, 14, width, dtype=np.float32)[None, :, None]
        texture = texture + ramp * rng.choice((-1, 1))
    elif style == "noise":
        texture = np.random.default_rng(rng.getrandbits(32)).integers(-12, 13, (height, width, 1)).astype(np.float32)
    elif style == "stripes":
        period = rng.randint(6, 16)
        texture = texture + np.where(np.arange(height) // period % 2, 7.0, -7.0).astype(np.float32)[:, None, None]
    return Image.fromarray((base + texture).clip(0, 255).astype(np.uint8))


def _stencil(shape: Shape, width: int, height: int, rng: random.Random) -> tuple[Image.Image, int, int]:
    """The shape's antialiased coverage (mode L) and where its top left corner goes, inside its cell."""
    cell_width, cell_height = width / 3, height / 3
    side = round(rng.uniform(0.72, 0.95) * min(cell_width, cell_height))
    large = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE))
    pen, box = ImageDraw.Draw(large), side * SUPERSAMPLE
    if shape.kind == "circle":
        pen.ellipse((0, 0, box - 1, box - 1), fill=255)
    else:
        tilt = math.radians(rng.uniform(-10, 10))
        pen.polygon([_turn(x, y, tilt, box) for x, y in OUTLINES[shape.kind]], fill=255)
    row, column = divmod(shape.cell, 3)
    left = round(column * cell_width + rng.random() * (cell_width - side))
    top = round(row * cell_height + rng.random() * (cell_height - side))
    stencil = large.resize((side, side), Image.Resampling.BOX)
    return stencil, min(left, width - side), min(top, height - side)


def _turn(x: float, y: float, tilt: float, box: int) -> tuple[float, float]:
    """A point of the unit outline ([-1, 1] both ways), tilted and scaled into a square of ``box`` pixels."""
    turned_x = x * math.cos(tilt) - y * math.sin(tilt)
    turned_y = x * math.sin(tilt) + y * math.cos(tilt)
    return (turned_x + 1) / 2 * (box - 1), (turned_y + 1) / 2 * (box - 1)


def _star() -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        radius, angle = (1.0 if corner % 2 == 0 else 0.42), math.pi * (corner / 5 - 0.5)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


_A, _B = 0.3, 0.92
# Outlines reach at most 1 from the centre along each axis once tilted by 10 degrees.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -0.95), (0.84, 0.8), (-0.84, 0.8)],
    "star": _star(),
    "cross": [
        (-_A, -_B), (_A, -_B), (_A, -_A), (_B, -_A), (_B, _A), (_A, _A),
        (_A, _B), (-_A, _B), (-_A, _A), (-_B, _A), (-_B, -_A), (-_A, -_A),
    ],
}  # fmt: skip
