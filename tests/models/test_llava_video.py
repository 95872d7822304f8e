"""The stages of LLaVA-OneVision and LLaVA-NeXT-Video against transformers: pictures and frames of videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import edit_config
from tests.checkpoints_llava_video import write_llava_next_video_checkpoint, write_llava_onevision_checkpoint
from tests.models.layouts import (
    CAUGHT,
    assert_equal,
    assert_language_model_equals,
    difference,
    export,
    load_reference,
    tap,
    unused_weights,
)
from torch import Tensor
from transformers import LlavaNextVideoForConditionalGeneration, LlavaOnevisionForConditionalGeneration

from bridgeport.errors import CheckpointError
from bridgeport.models import VisionLanguageModel, load_checkpoint
from bridgeport.models.pooling import BilinearPooling

ONEVISION: dict[str, dict[str, Any]] = {
    "siglip": {"seed": 1},
    "siglip-odd-tied": {"seed": 2, "tie": True, "vision": {"image_size": 35, "patch_size": 7}},
}
NEXT_VIDEO: dict[str, dict[str, Any]] = {
    "average": {"seed": 1},
    "max-odd": {"seed": 2, "mode": "max", "vision": {"image_size": 35, "patch_size": 7}},
    "conv": {"seed": 3, "mode": "conv", "stride": 3, "layer": -1},
}


@pytest.fixture(scope="module", params=ONEVISION)
def onevision(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_onevision_checkpoint(tmp_path_factory.mktemp("onevision"), **ONEVISION[request.param])


@pytest.fixture(scope="module", params=NEXT_VIDEO)
def next_video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_next_video_checkpoint(tmp_path_factory.mktemp("next-video"), **NEXT_VIDEO[request.param])


def pixels_for(model: VisionLanguageModel, count: int) -> Tensor:
    size = model.config.vision_config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("frames", [1, 3])
def test_onevision_pools_behind_the_projector(onevision: Path, frames: int) -> None:
    model = load_checkpoint(onevision)
    reference = load_reference(LlavaOnevisionForConditionalGeneration, onevision)
    pixels, side = pixels_for(model, frames), model.config.vision_config.image_size // 7
    with torch.inference_mode(), tap(reference.model.multi_modal_projector) as seen:
        video = reference.model.get_video_features(pixels[None]).pooler_output[0]
        image_embeds = model.encoder(pixels)
        features = model.connector(image_embeds)
        pooled = BilinearPooling((side, side))(features).flatten(0, 1)
    assert_equal(image_embeds, seen[0], "encoder")
    assert_equal(features, seen[1], "connector")
    newline = model.connector.get_parameter("image_newline")
    assert_equal(torch.cat([pooled, newline[None]]), video, "video features")
    assert difference(torch.cat([pooled, 0 * newline[None]]), video) > CAUGHT


@pytest.mark.parametrize("frames", [1, 3])
def test_next_video_pools_before_the_projector(next_video: Path, frames: int) -> None:
    model = load_checkpoint(next_video)
    reference = load_reference(LlavaNextVideoForConditionalGeneration, next_video)
    pixels = pixels_for(model, frames)
    with torch.inference_mode():
        with tap(reference.model.multi_modal_projector) as seen:
            video = reference.model.get_video_features(pixels[None]).pooler_output
        image_embeds = model.encoder(pixels)
        connector = model.load_stage("video_connector")
        assert_equal(connector.pooling(image_embeds), seen[0], "pooling")  # type: ignore[operator]
        features = connector(image_embeds)
        assert_equal(features, seen[1], "video_connector")
        assert_equal(features.flatten(0, 1), video.reshape(-1, video.shape[-1]), "video features")
        with tap(reference.model.multi_modal_projector) as picture:
            size = model.config.vision_config.image_size
            reference.model.get_image_features(pixels_for(model, 3), torch.tensor([[size, 2 * size]]))
        tiles = model.encoder(pixels_for(model, 3))
        assert_equal(tiles, picture[0], "encoder")
        assert_equal(model.connector(tiles), picture[1], "connector")
    assert model.contracts["video_connector"].outputs[0].shape[1:] == features.shape[1:]


def test_language_models_and_all_weights_are_read(onevision: Path, next_video: Path) -> None:
    for checkpoint, kind in (
        (onevision, LlavaOnevisionForConditionalGeneration),
        (next_video, LlavaNextVideoForConditionalGeneration),
    ):
        model = load_checkpoint(checkpoint)
        assert_language_model_equals(model, load_reference(kind, checkpoint))
        assert all(model.layout.ignores(name) for name in unused_weights(model))
        assert not [name for name in unused_weights(model) if "projector" in name or "language_model" in name]


@pytest.mark.parametrize("mode", ["average", pytest.param("conv", marks=pytest.mark.slow)])
def test_video_connector_exports_with_frames_dynamic(mode: str, tmp_path: Path) -> None:
    checkpoint = write_llava_next_video_checkpoint(tmp_path / "checkpoint", mode=mode)
    operators = export(load_checkpoint(checkpoint), "video_connector", tmp_path)
    assert operators[{"average": "AveragePool", "conv": "Conv"}[mode]] == 1


def test_refuses_pooling_that_it_does_not_know(tmp_path: Path) -> None:
    checkpoint = write_llava_next_video_checkpoint(tmp_path)
    edit_config(checkpoint, spatial_pool_mode="median")
    with pytest.raises(CheckpointError, match="spatial_pool_mode 'median' is unknown; known are average, max, conv"):
        load_checkpoint(checkpoint)
