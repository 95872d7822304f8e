"""The pictures and prompts that a parity check uses when it is given none.

A picture that is smooth, square or of the model's own size hides a wrong resize filter; so these have hard
edges, odd sizes and several modes, one is enlarged and one shrunk. The flat gray one hides nothing of
normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ...models.small.pictures import held_out

GRAY = 128


def default_pictures() -> list[tuple[str, Image.Image]]:
    """(description, picture), the same ones every time."""
    scenes = [example.image for example in held_out(4)]
    odd = scenes[0].crop((0, 0, scenes[0].width - 5, scenes[0].height - 3))
    large = scenes[1].resize((scenes[1].width * 3 + 1, scenes[1].height * 2 + 1), Image.Resampling.NEAREST)
    palette = scenes[2].quantize(16)
    gray_scale = scenes[3].convert("L").crop((3, 5, 60, 48))
    flat = Image.new("RGB", (61, 47), (GRAY, GRAY, GRAY))
    pictures = [("scene", odd), ("enlarged scene", large), ("palette scene", palette)]
    pictures += [("gray-scale cut-out", gray_scale), ("flat gray", flat)]
    return [(f"{name}, {picture.width}x{picture.height} {picture.mode}", picture) for name, picture in pictures]


def default_videos(frames: int) -> list[tuple[str, list[Image.Image]]]:
    """(description, frames) of two videos, made of the default pictures."""
    pictures = [picture for _, picture in default_pictures()]
    videos = [[pictures[(start + step) % len(pictures)] for step in range(frames)] for start in (0, 2)]
    return [(f"{frames} frames, the first {video[0].width}x{video[0].height}", video) for video in videos]


def default_films(lengths: Sequence[int]) -> list[tuple[str, list[Image.Image]]]:
    """(description, frames) of one video for each length: a window that moves over a scene, so all of one size."""
    films = []
    for place, frames in enumerate(lengths):
        scene = held_out(4)[place % 4].image.convert("RGB")
        width, height = scene.width - 3 * frames, scene.height - 2 * frames - place
        film = [scene.crop((3 * step, 2 * step, 3 * step + width, 2 * step + height)) for step in range(frames)]
        films.append((f"{frames} frames, {width}x{height}", film))
    return films


def default_prompts() -> list[str]:
    """The empty prompt, which asks for a caption, and a question about the second picture."""
    return ["", held_out(2)[1].questions[0].prompt]
