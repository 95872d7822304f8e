"""One tile: every step before the encoder equals transformers' Pillow processors of CLIP, LLaVA and SigLIP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from bridgeport.errors import BundleError, InputError
from bridgeport.image_contract import (
    CenterCrop,
    ImageContract,
    ImageStep,
    Normalize,
    PadSquare,
    Rescale,
    Resize,
    ResizeShortest,
    Whole,
)
from bridgeport.runtime.processor import load_image, preprocess_image
from bridgeport.runtime.processor.picture import prepare_picture

# The same operations in the same order and types; see test_processor_image.py. A crop that is one pixel off moves
# these noise pictures by more than 1.
TOLERANCE = 1e-6

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NUMBERS: tuple[ImageStep, ...] = (Rescale(factor=1 / 255), Normalize(mean=MEAN, std=STD))
# (width, height): one pixel, odd ones, thin ones, smaller and larger than the crop in one edge or both.
SIZES = (
    (1, 1), (2, 5), (27, 29), (28, 28), (37, 53), (201, 7), (3, 90), (331, 240), (1, 200), (200, 1), (640, 479),
)  # fmt: skip
MODES = ("RGB", "L", "RGBA", "P", "CMYK", "1")


def clip(size: int, height: int, width: int, resample: int = 3) -> Callable[[], Any]:
    make: Any = CLIPImageProcessorPil
    return lambda: make(size={"shortest_edge": size}, crop_size={"height": height, "width": width}, resample=resample)


def llava(**options: Any) -> Callable[[], Any]:
    make: Any = LlavaImageProcessorPil
    return lambda: make(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, **options)


def siglip() -> Any:
    make: Any = SiglipImageProcessorPil
    return make(size={"height": 30, "width": 26}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def shortest(size: int, resample: Any = "bicubic") -> ResizeShortest:
    return ResizeShortest(size=size, resample=resample)


COLOR = (122, 116, 104)  # int(mean * 255)
HALVES = Normalize(mean=(0.5,) * 3, std=(0.5,) * 3)
CROP = CenterCrop(height=28, width=28)
# Name -> (transformers' processor, the steps that are the same).
PROCESSORS: dict[str, tuple[Callable[[], Any], tuple[ImageStep, ...]]] = {
    "clip": (clip(28, 28, 28), (shortest(28), CROP, *NUMBERS)),
    "clip, larger resize": (clip(32, 28, 28, 2), (shortest(32, "bilinear"), CROP, *NUMBERS)),
    "clip, odd crop": (clip(31, 27, 30, 1), (shortest(31, "lanczos"), CenterCrop(height=27, width=30), *NUMBERS)),
    "clip, crop wider than the resize": (clip(20, 27, 30), (shortest(20), CenterCrop(height=27, width=30), *NUMBERS)),
    "llava": (llava(), (shortest(28), CROP, *NUMBERS)),
    "llava, padded to a square": (llava(do_pad=True), (PadSquare(color=COLOR), shortest(28), CROP, *NUMBERS)),
    "llava, padded, no crop": (
        llava(do_pad=True, do_center_crop=False, do_normalize=False),
        (PadSquare(color=COLOR), shortest(28), NUMBERS[0]),
    ),
    "siglip": (siglip, (Resize(height=30, width=26, resample="bilinear"), NUMBERS[0], HALVES)),
}


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(width * 1000 + height)
    rgba = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8), mode="RGBA")
    return rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode)


def theirs(name: str, picture: Image.Image) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = PROCESSORS[name][0]()(picture, return_tensors="np")["pixel_values"]
    return values


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("mode", MODES)
def test_pixels_equal_transformers(name: str, mode: str) -> None:
    contract = ImageContract(steps=PROCESSORS[name][1], tiling=Whole(tokens=4))
    for width, height in SIZES:
        picture = noise(width, height, mode)
        ours = prepare_picture(load_image(picture), contract).tensors["pixel_values"]
        expected = theirs(name, picture)
        assert ours.shape == expected.shape, f"{width}x{height}"
        assert ours.dtype == np.float32
        worst = np.abs(ours - expected).max()
        assert worst <= TOLERANCE, f"{width}x{height}: max abs {worst:.3g}"


@pytest.mark.parametrize(
    ("name", "place", "wrong"),
    [
        ("clip", 0, shortest(28, "bilinear")),
        ("clip, larger resize", 0, shortest(31, "bilinear")),
        ("clip, odd crop", 1, CenterCrop(height=27, width=28)),
        ("llava, padded to a square", 0, PadSquare(color=(122, 116, 0))),
        ("llava, padded to a square", 0, CROP),
        ("siglip", 2, NUMBERS[1]),
    ],
)
def test_a_planted_fault_shows(name: str, place: int, wrong: ImageStep) -> None:
    steps = list(PROCESSORS[name][1])
    steps[place] = wrong
    picture = noise(37, 53)
    ours, expected = preprocess_image(picture, steps), theirs(name, picture)[0]
    assert ours.shape != expected.shape or np.abs(ours - expected).max() > 0.1


def test_tokens_stand_between_the_texts() -> None:
    contract = ImageContract(steps=NUMBERS, tiling=Whole(tokens=3, before="<Img>", after="</Img>"))
    picture = prepare_picture(noise(4, 4), contract)
    assert picture.pieces == ("<Img>", 3, "</Img>")
    assert picture.rows.tolist() == [0, 1, 2]
    assert picture.weights is None
    assert prepare_picture(noise(4, 4), ImageContract(steps=NUMBERS, tiling=Whole(tokens=3))).pieces == (3,)


@pytest.mark.parametrize(
    ("step", "size", "message"),
    [
        (shortest(336), (1, 20_000), "1x20000 becomes 2257920000 pixels where its shorter edge becomes 336"),
        (shortest(336), (20_000, 1), "20000x1 becomes"),
        (PadSquare(color=COLOR), (20_000, 3), "20000x3 becomes 400000000 pixels where it is padded to a square"),
    ],
)
def test_a_picture_that_would_become_gigabytes_is_named(step: ImageStep, size: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        preprocess_image(Image.new("RGB", size), (step, CROP))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", [shortest(3), CROP, PadSquare(color=COLOR), Resize(height=2, width=2, resample="box")])
def test_a_step_on_pixels_after_arithmetic_is_refused(step: ImageStep) -> None:
    with pytest.raises(BundleError, match=f"has {step.op} after it rescales or normalises"):
        preprocess_image(noise(3, 3), (*NUMBERS, step))


def test_a_video_is_no_picture() -> None:
    with pytest.raises(InputError, match="a sequence of pictures came where the model takes one picture"):
        prepare_picture([noise(3, 3)], ImageContract(steps=NUMBERS, tiling=Whole(tokens=3)))
