"""Videos: frames, sampling, pooling and newline are those of transformers' video models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from bridgeport.errors import InputError
from bridgeport.image_contract import CenterCrop, Frames, ImageContract, Normalize, Rescale, ResizeShortest
from bridgeport.runtime.processor.picture import PictureTensors, prepare_picture
from bridgeport.runtime.processor.tiling.frames import choose_frames, load_video

# transformers' video processors need torchvision, whose resize rounds otherwise than Pillow's; the frames are held
# to the Pillow processor of the same settings, bit for bit but for a unit in the last place (see test_tiling_anyres).
PIXEL_TOLERANCE = 1e-6
# As in test_tiling_anyres.py: another order of sums here, another rounding of positions on other machines; a wrong
# neighbour moves features by more than 0.1.
FEATURE_ABSOLUTE, FEATURE_RELATIVE = 1e-4, 1e-6

STEPS = (
    ResizeShortest(size=28, resample="bicubic"),
    CenterCrop(height=28, width=28),
    Rescale(factor=1 / 255),
    Normalize(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)),
)


def contract_of(**options: Any) -> ImageContract:
    return ImageContract(steps=STEPS, tiling=Frames(**options))


def film(count: int, width: int = 37, height: int = 53) -> list[Image.Image]:
    random = np.random.default_rng(count)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("size", [(37, 53), (1, 1), (201, 7), (28, 28)])
def test_frames_equal_the_image_processor_of_the_same_settings(count: int, size: tuple[int, int]) -> None:
    make: Any = CLIPImageProcessorPil
    processor = make(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pictures = film(count, *size)
    ours = prepare_picture(pictures, contract_of(tokens=4)).tensors["pixel_values"]
    theirs = processor(pictures, return_tensors="np")["pixel_values"]
    assert ours.shape == theirs.shape == (count, 3, 28, 28)
    assert np.abs(ours - theirs).max() <= PIXEL_TOLERANCE
    if count > 1:  # a planted fault: frames in another order
        assert np.abs(ours[::-1] - theirs).max() > 0.1


def onevision(side: int, features: torch.Tensor, newline: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tokens that transformers makes of projected frames: its pooling, then the newline."""
    vision = SimpleNamespace(image_size=side * 4, patch_size=4)
    pool: Any = LlavaOnevisionModel.apply_pooling
    pooled = pool(SimpleNamespace(config=SimpleNamespace(vision_config=vision)), features)
    tokens: np.ndarray[Any, Any] = torch.cat([pooled.flatten(0, 1), newline[None]]).numpy()
    return tokens


def miss(picture: PictureTensors, side: int) -> float:
    """By how much the tokens miss transformers', in tolerances."""
    generator = torch.Generator().manual_seed(side)
    count = len(picture.tensors["pixel_values"])
    features, newline = torch.randn(count, side * side, 5, generator=generator), torch.randn(5, generator=generator)
    table = np.concatenate([features.reshape(-1, 5).numpy(), newline[None].numpy()])
    assert picture.weights is not None
    ours = (table[picture.rows] * picture.weights[..., None]).sum(axis=1)
    theirs = onevision(side, features, newline)
    if ours.shape != theirs.shape:
        return float("inf")
    return float((np.abs(ours - theirs) / (FEATURE_ABSOLUTE + FEATURE_RELATIVE * np.abs(theirs))).max())


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 27])
@pytest.mark.parametrize("count", [1, 3])
def test_pooling_equals_onevision(side: int, count: int) -> None:
    picture = prepare_picture(film(count), contract_of(tokens=side * side, pool_stride=2, newline=True))
    assert miss(picture, side) <= 1
    processor = object.__new__(LlavaOnevisionProcessor)
    processor.num_image_tokens, processor.video_token = side * side, "v"
    replaced = processor.replace_video_token({"pixel_values_videos": [picture.tensors["pixel_values"]]}, 0)
    assert picture.pieces == (len(replaced),)
    assert len(picture.rows) == len(replaced)


def test_planted_faults_in_the_pooling_show() -> None:
    picture = prepare_picture(film(2), contract_of(tokens=49, pool_stride=2, newline=True))
    assert picture.weights is not None
    assert miss(picture, 7) <= 1
    assert miss(replace(picture, weights=picture.weights[:, ::-1]), 7) > 1e3
    assert miss(replace(picture, rows=np.maximum(picture.rows - 1, 0)), 7) > 1e3
    assert miss(prepare_picture(film(2), contract_of(tokens=49, pool_stride=2)), 7) == float("inf")


def test_without_pooling_the_features_follow_each_other() -> None:
    """LLaVA-NeXT-Video (the connector pools) and InstructBLIP-Video: no newline, all features of all frames."""
    picture = prepare_picture(film(3), contract_of(tokens=4))
    assert (picture.rows.tolist(), picture.pieces, picture.weights) == (list(range(12)), (12,), None)
    assert prepare_picture(film(2), contract_of(tokens=4, newline=True)).rows.tolist() == list(range(9))


@pytest.mark.parametrize(("count", "sample"), [(8, 8), (9, 8), (100, 8), (17, 4), (3, 1)])
def test_sampling_equals_transformers(count: int, sample: int) -> None:
    theirs = default_sample_indices_fn(VideoMetadata(total_num_frames=count), num_frames=sample)
    tiling = Frames(tokens=4, sample=sample)
    assert choose_frames(count, tiling) == theirs.tolist()
    frames = film(count, 4, 4)
    assert load_video(frames, tiling) == [frames[index] for index in theirs]
    # What was sampled stays when it is prepared.
    assert choose_frames(sample, tiling) == list(range(sample))


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "a video has 0 frames; give at least one picture"),
        (0, {"sample": 4}, "a video has 0 frames"),
        (3, {"sample": 4}, "a video has 3 frames where 4 are sampled"),
        (3, {"frames": 4}, "a video has 3 frames where the model takes exactly 4"),
        (5, {"frames": 4}, "a video has 5 frames where the model takes exactly 4"),
    ],
)
def test_wrong_counts_are_named(count: int, options: dict[str, Any], message: str) -> None:
    contract = contract_of(tokens=4, **options)
    for call in (
        lambda: prepare_picture(film(count), contract),
        lambda: load_video(film(count), Frames(tokens=4, **options)),
    ):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_picture_is_no_video() -> None:
    with pytest.raises(InputError, match="a picture came where the model takes a video; give a video"):
        prepare_picture(film(1)[0], contract_of(tokens=4))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animated_file_gives_its_frames(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"film.{suffix}"
    pictures = [Image.new("RGB", (12, 10), colour) for colour in ("red", "blue", "lime", "white", "black")]
    lossless: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    pictures[0].save(file, save_all=True, append_images=pictures[1:], **lossless)
    for source in (file, str(file)):
        loaded = load_video(source, Frames(tokens=4))
        assert [picture.getpixel((5, 5)) for picture in loaded] == [p.getpixel((5, 5)) for p in pictures]
    with Image.open(file) as opened:
        sampled = load_video(opened, Frames(tokens=4, sample=2))
    assert [picture.getpixel((5, 5)) for picture in sampled] == [p.getpixel((5, 5)) for p in (pictures[0], pictures[2])]
    assert all(picture.mode == "RGB" for picture in loaded)


def test_a_still_picture_file_is_a_video_of_one_frame(tmp_path: Path) -> None:
    film(1)[0].save(tmp_path / "still.png")
    assert len(load_video(tmp_path / "still.png", Frames(tokens=4))) == 1


def test_bad_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"nowhere\.gif does not exist"):
        load_video(tmp_path / "nowhere.gif", Frames(tokens=4))
    pictures = film(6, 64, 64)
    file = tmp_path / "film.gif"
    pictures[0].save(file, save_all=True, append_images=pictures[1:])
    cut = tmp_path / "cut.gif"
    cut.write_bytes(file.read_bytes()[: len(file.read_bytes()) * 2 // 3])
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        load_video(cut, Frames(tokens=4))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    assert len(load_video(file, Frames(tokens=4, sample=4))) == 4
    with pytest.raises(InputError, match=r"film\.gif unpacks to 24576 pixels in 6 frames; accepted are 16384"):
        load_video(file, Frames(tokens=4))
