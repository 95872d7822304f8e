"""Pictures become the pixel values of transformers' Pillow processor; bad ones are named in one line."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image as transformers_load_image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from bridgeport.errors import BundleError, InputError
from bridgeport.image_contract import ImageStep, Normalize, Rescale, Resize
from bridgeport.runtime.processor import load_image, preprocess_image, preprocess_images

# The same operations in the same order and types: equal bit for bit here. The tolerance leaves a unit in the
# last place of values near 3 (2.4e-7) to a numpy built for another machine; the wrong filter below is 1e5
# times that.
TOLERANCE = 1e-6

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = ((1, 1), (2, 5), (37, 53), (201, 7), (224, 224), (331, 240))
MODES = ("RGB", "L", "LA", "RGBA", "P", "PA", "CMYK", "YCbCr", "1", "I;16", "I", "F")
# Three processors: BLIP-2's own; another filter without normalisation; an odd shape with another range.
CONFIGS: dict[str, dict[str, Any]] = {
    "blip-2": {"size": {"height": 28, "width": 28}, "resample": 3, "mean": CLIP_MEAN, "std": CLIP_STD},
    "rescale only": {"size": {"height": 32, "width": 32}, "resample": 2},
    "odd": {"size": {"height": 45, "width": 31}, "resample": 1, "mean": (0.5,) * 3, "std": (0.3, 0.5, 0.7)},
}
FILTERS: dict[int, Any] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


def steps_of(config: dict[str, Any]) -> tuple[ImageStep, ...]:
    steps: list[Any] = [
        Resize(**config["size"], resample=FILTERS[config["resample"]]),
        Rescale(factor=1 / 255),
    ]
    if "mean" in config:
        steps.append(Normalize(mean=config["mean"], std=config["std"]))
    return tuple(steps)


def theirs(config: dict[str, Any], picture: Image.Image) -> np.ndarray[Any, Any]:
    processor: Any = BlipImageProcessorPil(
        size=config["size"],
        resample=config["resample"],
        do_normalize="mean" in config,
        image_mean=list(config.get("mean", CLIP_MEAN)),
        image_std=list(config.get("std", CLIP_STD)),
    )
    values: np.ndarray[Any, Any] = processor(picture, return_tensors="np")["pixel_values"][0]
    return values


def noise(width: int, height: int, mode: str) -> Image.Image:
    random = np.random.default_rng(width * 1000 + height)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width), dtype=np.uint16))
    rgba = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8), mode="RGBA")
    if mode in ("RGBA", "LA"):
        return rgba.convert(mode)
    if mode == "PA":
        return rgba.convert("RGB").convert("P").convert("PA")
    return rgba.convert("RGB").convert("L").convert(mode) if mode in "IF" else rgba.convert("RGB").convert(mode)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mode", MODES)
def test_pixels_equal_transformers(name: str, mode: str) -> None:
    config = CONFIGS[name]
    for width, height in SIZES:
        picture = noise(width, height, mode)
        ours = preprocess_image(load_image(picture), steps_of(config))
        assert ours.dtype == np.float32
        assert ours.flags.c_contiguous
        worst = np.abs(ours - theirs(config, picture)).max()
        assert worst <= TOLERANCE, f"{width}x{height} {mode}: max abs {worst:.3g}"


@pytest.mark.parametrize("wrong", ["bilinear", "lanczos", "nearest", "box", "hamming"])
def test_a_wrong_filter_shows(wrong: Any) -> None:
    config = CONFIGS["blip-2"]
    picture = noise(37, 53, "RGB")
    steps = (Resize(height=28, width=28, resample=wrong), *steps_of(config)[1:])
    ours = preprocess_image(picture, steps)
    assert np.abs(ours - theirs(config, picture)).max() > 0.1


def test_golden_values() -> None:
    """By hand: 0, 51 and 255 with mean 0.5 and std 0.25 are -2, -1.2 and 2."""
    picture = Image.new("RGB", (1, 1), (0, 51, 255))
    steps = (
        Resize(height=1, width=2, resample="nearest"),
        Rescale(factor=1 / 255),
        Normalize(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    )
    expected = np.array([[[-2.0, -2.0]], [[-1.2, -1.2]], [[2.0, 2.0]]])
    np.testing.assert_allclose(preprocess_image(picture, steps), expected, atol=2e-7, rtol=0)
    assert preprocess_images([picture, picture], steps).shape == (2, 3, 1, 2)


def test_resize_after_rescale_is_refused() -> None:
    steps = (Rescale(factor=1.0), Resize(height=2, width=2, resample="box"))
    with pytest.raises(BundleError, match="has resize after it rescales or normalises"):
        preprocess_image(Image.new("RGB", (3, 3)), steps)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"), ("RGB", "jpg"), ("RGB", "webp"), ("RGB", "bmp"), ("L", "png"), ("L", "jpg"),
        ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("P", "gif"), ("CMYK", "jpg"), ("CMYK", "tiff"),
        ("1", "png"), ("1", "tiff"), ("I;16", "png"), ("I;16", "tiff"), ("F", "tiff"),
    ],
)  # fmt: skip
def test_files_equal_transformers(tmp_path: Path, mode: str, suffix: str) -> None:
    file = tmp_path / f"picture.{suffix}"
    noise(41, 29, mode).save(file)
    config = CONFIGS["blip-2"]
    with Image.open(file) as opened:
        expected = theirs(config, opened)
    for source in (file, str(file)):
        assert np.abs(preprocess_image(load_image(source), steps_of(config)) - expected).max() <= TOLERANCE


def test_palette_with_transparency_lies_on_white(tmp_path: Path) -> None:
    file = tmp_path / "clear.png"
    picture = noise(16, 16, "P")
    picture.save(file, transparency=picture.getpixel((3, 5)))
    loaded = load_image(file)
    assert loaded.getpixel((3, 5)) == (255, 255, 255)
    with Image.open(file) as opened:
        expected = theirs(CONFIGS["blip-2"], opened)
    assert np.abs(preprocess_image(loaded, steps_of(CONFIGS["blip-2"])) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_transformers_load_image_does(tmp_path: Path, orientation: int) -> None:
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(40, 24, "RGB").save(file, exif=exif)
    ours, expected = load_image(file), transformers_load_image(str(file))
    assert ours.size == expected.size == ((40, 24) if orientation < 5 else (24, 40))
    assert np.array_equal(np.asarray(ours), np.asarray(expected))
    with Image.open(file) as opened:  # a picture and its file give the same
        assert np.array_equal(np.asarray(load_image(opened)), np.asarray(ours))


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    file = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(file, save_all=True, append_images=frames[1:])
    assert load_image(file).getpixel((2, 2)) == (255, 0, 0)


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def cut(suffix: str) -> bytes:
    import io

    buffer = io.BytesIO()
    noise(64, 64, "RGB").save(buffer, format=suffix)
    return buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.png", b"this is no picture\n", "is not a picture that Pillow can read"),
        ("empty.png", b"", "is not a picture that Pillow can read"),
        ("cut.png", cut("PNG"), "cannot be decoded .*truncated"),
        ("cut.jpg", cut("JPEG"), "cannot be decoded .*truncated"),
        ("cut.webp", cut("WEBP"), "is not a picture|cannot be decoded"),
        ("zero.ppm", b"P6 0 0 255\n", "0x0|cannot be decoded|is not a picture"),
        ("zero.png", png(0, 0), "0x0|cannot be decoded|is not a picture"),
        ("bomb.png", png(50_000, 50_000), "larger than Pillow's limit of 89478485 pixels"),
        ("big.png", png(10_000, 10_000), "larger than Pillow's limit of 89478485 pixels"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_image(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.png does not exist; name a picture file"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match="is a directory; name a picture file"):
        load_image(tmp_path)
    with pytest.raises(InputError, match="has 0x4 pixels; it must have at least 1x1"):
        load_image(Image.new("RGB", (0, 4)))
