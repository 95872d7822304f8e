"""What parity runs on: pictures, and videos where the bundle takes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from bridgeport.errors import InputError
from bridgeport.image_contract import Frames, ImageContract, Whole
from bridgeport.runtime import Video
from bridgeport.runtime.parity.cases import choose_cases

PICTURES = ImageContract(steps=(), tiling=Whole(tokens=4))
FRAME = Image.new("L", (9, 8))


def manifest(frames: Frames | None = None, *, alone: bool = False) -> Any:
    """Of pictures; with `frames` of videos too, or of nothing else (`alone`)."""
    video = None if frames is None else ImageContract(steps=(), tiling=frames)
    if alone:
        return SimpleNamespace(image=video, video=None, model_kind="instructblip-video")
    return SimpleNamespace(image=PICTURES, video=video, model_kind="llava-onevision")


def test_default_cases_hold_videos_where_the_bundle_takes_them() -> None:
    assert all(isinstance(case.image, Image.Image) for case in choose_cases(manifest(), None, None, None))
    cases = choose_cases(manifest(Frames(tokens=4)), None, None, None)
    videos = [case for case in cases if isinstance(case.image, Video)]
    assert [case.picture for case in videos] == ["3 frames, 215x218", "2 frames, 114x155"]
    assert len(cases) == len(choose_cases(manifest(), None, None, None)) + 2
    assert {case.prompt for case in videos} == {case.prompt for case in cases}
    frames: Any = videos[0].image.source
    assert len({frame.tobytes() for frame in frames}) == 3
    again = choose_cases(manifest(Frames(tokens=4)), None, None, None)
    assert [frame.tobytes() for frame in again[5].image.source] == [frame.tobytes() for frame in frames]
    sampled = choose_cases(manifest(Frames(tokens=4, sample=8)), None, None, None)
    assert [len(case.image.source) for case in sampled[-2:]] == [8, 8]


def test_given_pictures_and_videos(tmp_path: Path) -> None:
    folder = tmp_path / "film"
    folder.mkdir()
    for place in range(2):
        FRAME.save(folder / f"{place}.png")
    cases = choose_cases(manifest(Frames(tokens=4)), [FRAME], [[FRAME] * 3, folder], ["a", "b"])
    assert [(case.picture, case.prompt) for case in cases] == [
        ("picture, 9x8 L", "a"),
        ("video of 3 frames", "b"),
        ("film of 2 frames", "a"),
    ]
    assert [frame.mode for frame in cases[1].image.source] == ["RGB"] * 3
    assert len(choose_cases(manifest(Frames(tokens=4)), None, [[FRAME]], ["a"])) == 1
    # A model of videos alone takes their frames as they are.
    alone = choose_cases(manifest(Frames(tokens=4), alone=True), None, [[FRAME] * 2, folder], ["a"])
    assert [len(case.image) for case in alone] == [2, 2]


@pytest.mark.parametrize(
    ("made", "images", "videos", "message"),
    [
        (manifest(), None, [[FRAME]], r"1 videos came, and this bundle \(llava-onevision\) takes none"),
        (manifest(Frames(tokens=4)), None, [], "images is empty"),
        (manifest(Frames(tokens=4)), [], [], "images is empty"),
        (manifest(Frames(tokens=4)), None, [[]], "0 frames"),
        (manifest(Frames(tokens=4)), None, [[FRAME, Image.new("L", (3, 3))]], "its frames are of 2 sizes"),
        (manifest(Frames(tokens=4, sample=3)), None, [[FRAME] * 2], "3"),
    ],
)
def test_bad_cases(made: Any, images: Any, videos: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        choose_cases(made, images, videos, None)
    assert "\n" not in str(caught.value)
