"""A frozen video processor runs as the image processor of the same settings; what cannot be frozen is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import InstructBlipVideoConfig, LlavaConfig, LlavaNextVideoConfig, LlavaOnevisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from bridgeport.errors import BridgeportError, CheckpointError, UnsupportedError
from bridgeport.export.image_processors.frames import freeze_video_contract
from bridgeport.image_contract import Frames, ImageContract
from bridgeport.runtime.processor import prepare_picture

CLIP = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "hidden_size": 12}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7, "hidden_size": 12}
TEXT = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}

CROPPED: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
EXACT: dict[str, Any] = {"size": {"height": 28, "width": 28}}


def make(kind: Any, **options: Any) -> Any:
    return kind(**options)


def llava() -> Any:
    return LlavaConfig(vision_config=dict(CLIP), text_config=TEXT)


def onevision() -> Any:
    return LlavaOnevisionConfig(vision_config=dict(SIGLIP), text_config=TEXT)


def next_video(**options: Any) -> Any:
    return LlavaNextVideoConfig(vision_config=dict(CLIP), text_config=TEXT, **options)


def instruct_blip_video() -> Any:
    return InstructBlipVideoConfig(vision_config={"image_size": 28, "patch_size": 14}, num_query_tokens=5)


CLIP_VALUES = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
# Name -> (settings, config, the tiling, the image processor of the same settings).
VIDEOS: dict[str, tuple[dict[str, Any], Callable[[], Any], Frames, Callable[[], Any]]] = {
    "llava-next-video": (CROPPED, next_video, Frames(tokens=1), lambda: make(CLIPImageProcessorPil, **CROPPED)),
    "llava-next-video, sampled": (
        {**CROPPED, "do_sample_frames": True, "num_frames": 2},
        next_video,
        Frames(tokens=1, sample=2),
        lambda: make(CLIPImageProcessorPil, **CROPPED),
    ),
    "onevision": (
        EXACT,
        onevision,
        Frames(tokens=16, pool_stride=2, newline=True),
        lambda: make(SiglipImageProcessorPil, **EXACT, **CLIP_VALUES),
    ),
    "instructblip-video": (
        EXACT,
        instruct_blip_video,
        Frames(tokens=5, frames=4),
        lambda: make(SiglipImageProcessorPil, **EXACT, **CLIP_VALUES),
    ),
}


def write_settings(directory: Path, settings: dict[str, Any], place: str) -> None:
    if place == "processor_config.json":
        settings = {"processor_class": "X", "video_processor": settings}
    (directory / place).write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "place", ["processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize("name", VIDEOS)
def test_a_frozen_video_processor(tmp_path: Path, name: str, place: str) -> None:
    """Held against the image processor of the same settings: transformers' own needs torchvision."""
    settings, config, tiling, relative = VIDEOS[name]
    write_settings(tmp_path, settings, place)
    contract = freeze_video_contract(tmp_path, config())
    assert contract.tiling == tiling
    random = np.random.default_rng(5)
    frames = [Image.fromarray(random.integers(0, 256, (31, 47, 3), dtype=np.uint8)) for _ in range(4)]
    taken = frames if tiling.sample is None else frames[::2]
    theirs = relative()(taken, return_tensors="np")["pixel_values"]
    picture = prepare_picture(frames, contract)
    assert np.abs(picture.tensors["pixel_values"] - theirs).max() <= 1e-6
    assert ImageContract.model_validate_json(contract.model_dump_json()) == contract


def test_the_nested_settings_of_the_processor_come_first(tmp_path: Path) -> None:
    write_settings(tmp_path, {"size": {"height": 30, "width": 30}}, "preprocessor_config.json")
    write_settings(tmp_path, EXACT, "processor_config.json")
    assert freeze_video_contract(tmp_path, onevision()).steps[0].model_dump()["height"] == 28
    # A processor_config.json without the entry is not about videos.
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="makes 30x30 pictures"):
        freeze_video_contract(tmp_path, onevision())


# What is wrong -> (settings, config, the error, what it says).
BAD_VIDEOS: dict[str, tuple[dict[str, Any] | None, Callable[[], Any], type[BridgeportError], str]] = {
    "none": (None, onevision, CheckpointError, r"has no video processor \(none of processor_config\.json, video_"),
    "a model of pictures": (
        EXACT,
        llava,
        UnsupportedError,
        "'llava' takes no video; those that do are llava_next_video",
    ),
    "another class": (
        EXACT | {"video_processor_type": "Qwen2VLVideoProcessor"},
        onevision,
        UnsupportedError,
        "video processor Qwen2VLVideoProcessor is not built; built is LlavaOnevisionVideoProcessor",
    ),
    "frames per second": (
        {**EXACT, "do_sample_frames": True, "fps": 2},
        onevision,
        UnsupportedError,
        "samples by fps, which needs the film's own; accepted is num_frames",
    ),
    "size": ({"size": {"height": 14, "width": 28}}, onevision, CheckpointError, "makes 14x28 pictures"),
    "crop wider than the frame": (
        CROPPED | {"size": {"shortest_edge": 20}},
        next_video,
        UnsupportedError,
        "crops 28x28 out of frames whose shorter edge is 20",
    ),
    "odd stride": (
        CROPPED,
        lambda: next_video(spatial_pool_stride=1),
        UnsupportedError,
        "pooled with spatial_pool_stride 1, are 4 features where the processor writes 1 placeholders",
    ),
    "class token": (
        CROPPED,
        lambda: next_video(vision_feature_select_strategy="full"),
        UnsupportedError,
        "a frame has 5 features where its patches are 2x2",
    ),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_what_cannot_be_frozen_of_a_video_processor_is_named(tmp_path: Path, name: str) -> None:
    settings, config, kind, message = BAD_VIDEOS[name]
    if settings is not None:
        write_settings(tmp_path, settings, "video_preprocessor_config.json")
    with pytest.raises(kind, match=message) as caught:
        freeze_video_contract(tmp_path, config())
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_corrupt_video_processor_is_named(tmp_path: Path) -> None:
    (tmp_path / "video_preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"video_preprocessor_config\.json cannot be read as JSON"):
        freeze_video_contract(tmp_path, onevision())
