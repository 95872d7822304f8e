"""Processors that cut pictures in their own way are frozen as their files have them, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.tilings import MEAN, STD, assert_close, byte_tokenizer, noise
from transformers import (
    Idefics2Config,
    Idefics3Config,
    InternVLConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    SmolVLMConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from bridgeport.errors import CheckpointError, UnsupportedError
from bridgeport.export.checkpoint_processor import load_image_processor
from bridgeport.export.image_processors import freeze_image_contract
from bridgeport.image_contract import Crops, Padded, Patches, Split
from bridgeport.runtime.processor.picture import prepare_picture

IMAGE_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
IDEFICS3: dict[str, Any] = {"vision_config": {"image_size": 24, "patch_size": 4}, "scale_factor": 3}
INTERNVL: dict[str, Any] = {
    "vision_config": {"image_size": [16, 24], "patch_size": [4, 4]},
    "image_seq_length": 6,
    "downsample_ratio": 0.5,
}
QWEN: dict[str, Any] = {"vision_config": {"patch_size": 6, "spatial_merge_size": 3, "temporal_patch_size": 1}}
QWEN_25 = {"vision_config": QWEN["vision_config"] | {"window_size": 40}}
QWEN_PICTURES: dict[str, Any] = {
    "size": {"shortest_edge": 2000, "longest_edge": 5000},
    "patch_size": 6,
    "merge_size": 3,
    "temporal_patch_size": 1,
}
QWEN_TILING: dict[str, Any] = {
    "patch_size": 6,
    "temporal_patch_size": 1,
    "merge_size": 3,
    "min_pixels": 2000,
    "max_pixels": 5000,
    "resample": "bicubic",
}
# Config and image processor with their settings, and the tiling that they are by hand. Nothing stands at its default.
CASES: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any], Any]] = {
    "idefics2": (
        Idefics2Config,
        {"perceiver_config": {"resampler_n_latents": 5}, "vision_config": {"patch_size": 10}},
        Idefics2ImageProcessorPil,
        {"size": {"shortest_edge": 20, "longest_edge": 50}, "do_image_splitting": True, "resample": 1},
        Padded(tokens=5, shortest_edge=20, longest_edge=50, resample="lanczos", splitting=True),
    ),
    "idefics3": (
        Idefics3Config,
        IDEFICS3,
        Idefics3ImageProcessorPil,
        {"size": {"longest_edge": 72}, "max_image_size": {"longest_edge": 24}, "resample": 3},
        Split(tokens=4, longest_edge=72, tile_size=24, resample="bicubic", splitting=True),
    ),
    "smolvlm": (
        SmolVLMConfig,
        IDEFICS3,
        SmolVLMImageProcessorPil,
        {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}, "do_image_splitting": False},
        Split(
            tokens=4, longest_edge=48, tile_size=24, resample="lanczos", splitting=False, global_tag="<global-picture>"
        ),
    ),
    "internvl": (
        InternVLConfig,
        INTERNVL,
        GotOcr2ImageProcessorPil,
        {"size": {"height": 16, "width": 24}, "min_patches": 2, "max_patches": 5, "crop_to_patches": True},
        Crops(tokens=6, height=16, width=24, min_tiles=2, max_tiles=5, resample="bicubic"),
    ),
    "qwen2_vl": (Qwen2VLConfig, QWEN, Qwen2VLImageProcessorPil, QWEN_PICTURES, Patches(**QWEN_TILING)),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        QWEN_25,
        Qwen2VLImageProcessorPil,
        QWEN_PICTURES,
        Patches(**QWEN_TILING, window_size=40),
    ),
}


def write(path: Path, name: str, **changes: Any) -> tuple[Any, Any]:
    """The checkpoint's processor files; returns the image processor as it loads from there, and the config."""
    make_config, config, make, settings, _ = CASES[name]
    byte_tokenizer(**IMAGE_TOKENS, global_image_token="<global-picture>").save_pretrained(path)
    numbers = {"image_mean": list(MEAN), "image_std": list(STD)}
    make(**numbers | settings | changes).save_pretrained(path)
    return load_image_processor(path), make_config(**config)


@pytest.mark.parametrize("name", CASES)
def test_frozen_as_the_files_say(name: str, tmp_path: Path) -> None:
    processor, config = write(tmp_path, name)
    contract = freeze_image_contract(tmp_path, processor, config)
    assert contract.tiling == CASES[name][-1]
    for width, height in ((37, 53), (90, 21)):
        theirs = processor(noise(width, height), return_tensors="np")["pixel_values"]
        ours = prepare_picture(noise(width, height), contract).tensors["pixel_values"]
        # A batch has an axis more than its one picture; Qwen2-VL's groups of patches are one axis there.
        theirs = theirs[0] if theirs.ndim == 5 else theirs
        theirs = theirs.reshape(ours.shape) if theirs.ndim == 2 else theirs
        assert_close(ours, theirs, f"{name} {width}x{height}")


def test_internvl_without_a_grid(tmp_path: Path) -> None:
    """One tile, whatever min_patches says: transformers cuts for max_patches over 1 only."""
    processor, config = write(tmp_path, "internvl", min_patches=1, max_patches=1)
    contract = freeze_image_contract(tmp_path, processor, config)
    assert isinstance(contract.tiling, Crops)
    assert (contract.tiling.min_tiles, contract.tiling.max_tiles) == (1, 1)
    theirs = processor(noise(90, 21), return_tensors="np")["pixel_values"]
    assert_close(prepare_picture(noise(90, 21), contract).tensors["pixel_values"], theirs, "one tile")


@pytest.mark.parametrize(
    ("name", "setting", "right"),
    [("idefics2", "image_seq_len", 5), ("idefics3", "image_seq_len", 4), ("internvl", "image_seq_length", 6)],
)
def test_another_count_of_tokens_is_refused(name: str, setting: str, right: int, tmp_path: Path) -> None:
    processor, config = write(tmp_path, name)
    (tmp_path / "processor_config.json").write_text(json.dumps({setting: right}), encoding="utf-8")
    freeze_image_contract(tmp_path, processor, config)
    (tmp_path / "processor_config.json").write_text(json.dumps({setting: right + 1}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{setting} of processor_config.json is {right + 1}.*set it to {right}"):
        freeze_image_contract(tmp_path, processor, config)
    (tmp_path / "processor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        freeze_image_contract(tmp_path, processor, config)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("idefics2", {"do_resize": False}, "do_resize False"),
        ("idefics2", {"do_pad": False}, "do_pad False"),
        ("idefics2", {"size": {"height": 20, "width": 20}}, "accepted is a resize within a shortest_edge"),
        ("idefics3", {"do_resize": False}, "accepted is a resize to a longest_edge"),
        ("idefics3", {"size": {"height": 20, "width": 20}}, "accepted is a resize to a longest_edge"),
        ("internvl", {"do_resize": False}, "accepted is a resize to a height and width"),
        ("qwen2_vl", {"do_resize": False}, "accepted is a resize between"),
    ],
)
def test_what_a_tiling_does_not_say_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    processor, config = write(tmp_path, name, **changes)
    with pytest.raises(UnsupportedError, match=message) as caught:
        freeze_image_contract(tmp_path, processor, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("idefics2", {"size": {"shortest_edge": 9, "longest_edge": 50}}, "shortest_edge of the image processor is 9"),
        ("idefics3", {"max_image_size": {"longest_edge": 32}}, "makes 32x32 pictures, the vision encoder takes 24x24"),
        ("internvl", {"size": {"height": 24, "width": 24}}, "makes 24x24 pictures, the vision encoder takes 16x24"),
        ("internvl", {"min_patches": 6}, "min_patches is 6 and max_patches 5"),
        ("qwen2_vl", {"patch_size": 7}, r"are \[7, 1, 3\], the vision tower takes \[6, 1, 3\]"),
        ("idefics3", {"image_std": [0.5, 0.0, 0.5]}, "no channel may be 0"),
    ],
)
def test_a_processor_of_another_model_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    processor, config = write(tmp_path, name, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        freeze_image_contract(tmp_path, processor, config)
    assert "\n" not in str(caught.value)


def test_configs_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    processor, _ = write(tmp_path, "idefics3")
    with pytest.raises(CheckpointError, match="6x6 patches, which scale_factor 4 does not divide"):
        freeze_image_contract(tmp_path, processor, Idefics3Config(**IDEFICS3 | {"scale_factor": 4}))
    processor, _ = write(tmp_path, "internvl")
    with pytest.raises(CheckpointError, match=r"image_seq_length of config.json is 7.* has 6 features"):
        freeze_image_contract(tmp_path, processor, InternVLConfig(**INTERNVL | {"image_seq_length": 7}))
    processor, _ = write(tmp_path, "qwen2_5_vl")
    small = Qwen2_5_VLConfig(vision_config=QWEN["vision_config"] | {"window_size": 17})
    with pytest.raises(CheckpointError, match="window_size is 17, under one group of 18 pixels"):
        freeze_image_contract(tmp_path, processor, small)


def test_a_tokenizer_without_marks_is_refused(tmp_path: Path) -> None:
    processor, config = write(tmp_path, "internvl")
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the tokenizer has no start_image_token; add it"):
        freeze_image_contract(tmp_path, processor, config)


def test_the_image_processor_of_got_ocr2_alone_is_refused(tmp_path: Path) -> None:
    processor, _ = write(tmp_path, "internvl")
    with pytest.raises(UnsupportedError, match="built for internvl, this is a 'qwen2_vl'"):
        freeze_image_contract(tmp_path, processor, Qwen2VLConfig())
