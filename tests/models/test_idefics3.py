"""The stages of Idefics3 and SmolVLM against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import edit_config
from tests.checkpoints_idefics3 import write_idefics3_checkpoint
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
from transformers import Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration

from bridgeport.errors import CheckpointError
from bridgeport.models import load_checkpoint

CONFIGS: dict[str, dict[str, Any]] = {
    "idefics3": {"seed": 1},
    "idefics3-by-three": {
        "seed": 2,
        "scale_factor": 3,
        "vision": {"image_size": 47, "patch_size": 5, "num_hidden_layers": 3},
        "text": {"hidden_size": 48, "head_dim": 24},
    },
    "smolvlm-tied": {"seed": 3, "smol": True, "tie": True, "vision": {"image_size": 32, "patch_size": 4}},
}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idefics3_checkpoint(tmp_path_factory.mktemp(request.param), **CONFIGS[request.param])


def reference_of(checkpoint: Path) -> Any:
    smol = "smolvlm" in checkpoint.name
    return load_reference(SmolVLMForConditionalGeneration if smol else Idefics3ForConditionalGeneration, checkpoint)


@pytest.mark.parametrize("tiles", [1, 3])
def test_stages_equal_transformers(checkpoint: Path, tiles: int) -> None:
    model, reference = load_checkpoint(checkpoint), reference_of(checkpoint)
    size = model.config.vision_config.image_size
    pixels = torch.randn(tiles, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), tap(reference.model.connector) as seen:
        reference.model.get_image_features(pixels[None], torch.ones(1, tiles, size, size, dtype=torch.bool))
        image_embeds = model.encoder(pixels)
        features = model.connector(image_embeds)
        model.encoder.places = model.encoder.get_buffer("places").roll(1)
        moved = model.encoder(pixels)
    assert_equal(image_embeds, seen[0], "encoder")
    assert_equal(features, seen[1], "connector")
    assert difference(moved, seen[0]) > CAUGHT


def test_language_model_and_all_weights_are_read(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint)
    assert_language_model_equals(model, reference_of(checkpoint))
    assert unused_weights(model) == []


@pytest.mark.parametrize("stage", [pytest.param("encoder", marks=pytest.mark.slow), "connector"])
def test_exports_with_tiles_dynamic(stage: str, tmp_path: Path) -> None:
    operators = export(load_checkpoint(write_idefics3_checkpoint(tmp_path / "checkpoint")), stage, tmp_path)
    assert operators["MatMul"] > 0


def test_refuses_squares_that_do_not_fit(tmp_path: Path) -> None:
    checkpoint = write_idefics3_checkpoint(tmp_path)
    edit_config(checkpoint, scale_factor=4)
    with pytest.raises(CheckpointError, match="6 x 6 tokens cannot be cut into squares of 4 x 4"):
        load_checkpoint(checkpoint)
