"""InternVL's stages against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import edit_config
from tests.checkpoints_internvl import write_internvl_checkpoint
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
from transformers import InternVLForConditionalGeneration

from bridgeport.errors import CheckpointError
from bridgeport.models import load_checkpoint

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {"seed": 1},
    "qwen2-tied-rms": {
        "seed": 2,
        "tie": True,
        "vision": {
            "image_size": [40, 40],
            "patch_size": [5, 5],
            "norm_type": "rms_norm",
            "use_qk_norm": True,
            "attention_bias": True,
            "use_mean_pooling": False,
        },
        "downsample_ratio": 0.25,
        "text": {"hidden_size": 48, "head_dim": 24},
    },
    "llama-second-last": {"seed": 3, "layer": -2, "text": {"model_type": "llama"}, "downsample_ratio": 1.0},
}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_internvl_checkpoint(tmp_path_factory.mktemp(request.param), **CONFIGS[request.param])


@pytest.mark.parametrize("tiles", [1, 3])
def test_stages_equal_transformers(checkpoint: Path, tiles: int) -> None:
    model = load_checkpoint(checkpoint)
    reference = load_reference(InternVLForConditionalGeneration, checkpoint)
    vision = model.config.vision_config
    pixels = torch.randn(tiles, 3, *vision.image_size, generator=torch.Generator().manual_seed(0))
    side = vision.image_size[0] // vision.patch_size[0]
    factor = round(1 / model.config.downsample_ratio)
    with torch.inference_mode(), tap(reference.model.multi_modal_projector) as seen:
        reference.model.get_image_features(pixels)
        image_embeds = model.encoder(pixels)
        features = model.connector(image_embeds)
        turned = model.connector(image_embeds.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2))
    # What transformers' projector reads is shuffled already.
    squares = image_embeds.unflatten(1, (side // factor, factor, side // factor, factor)).permute(0, 1, 3, 2, 4, 5)
    assert_equal(squares.reshape(seen[0].shape), seen[0], "encoder")
    assert_equal(features, seen[1], "connector")
    if factor < side:
        assert difference(turned, seen[1]) > CAUGHT


def test_language_model_and_all_weights_are_read(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint)
    assert_language_model_equals(model, load_reference(InternVLForConditionalGeneration, checkpoint))
    last = model.config.vision_config.num_hidden_layers - 1
    unused = unused_weights(model)
    if model.config.vision_feature_layer == -1:
        assert unused == []
    else:
        assert unused
        assert all(name.startswith(f"model.vision_tower.encoder.layer.{last}.") for name in unused)


@pytest.mark.parametrize("stage", [pytest.param("encoder", marks=pytest.mark.slow), "connector"])
def test_exports_with_tiles_dynamic(stage: str, tmp_path: Path) -> None:
    operators = export(load_checkpoint(write_internvl_checkpoint(tmp_path / "checkpoint")), stage, tmp_path)
    assert operators["LayerNormalization"] == {"encoder": 6, "connector": 1}[stage]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample_ratio": 1 / 3}, r"downsample_ratio is 0.33.*; accepted are 1, 0.5, 0.25"),
        ({"vision_feature_layer": 9}, r"vision_feature_layer is 9, and the vision tower has 3 layers"),
        ({"vision_feature_layer": [1, 2]}, r"vision_feature_layer is \[1, 2\], .* accepted is one number"),
        ({"vision_feature_select_strategy": "full"}, r"selected as 'full' are no square"),
    ],
)
def test_refuses_what_it_cannot_build(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = write_internvl_checkpoint(tmp_path)
    edit_config(checkpoint, **change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)
