"""Idefics2's stages against transformers, for pictures of different shapes in one padded batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import edit_config
from tests.checkpoints_idefics2 import write_idefics2_checkpoint
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
from transformers import Idefics2ForConditionalGeneration
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

from bridgeport.errors import CheckpointError
from bridgeport.models import load_checkpoint
from bridgeport.models.idefics2 import complete_patches, place_table

CONFIGS: dict[str, dict[str, Any]] = {
    "six-places": {"seed": 1},
    "odd-tied": {
        "seed": 2,
        "tie": True,
        "vision": {"image_size": 45, "patch_size": 5, "num_hidden_layers": 3},
        "perceiver": {"resampler_n_latents": 7, "resampler_depth": 1, "resampler_n_heads": 3, "num_key_value_heads": 3},
        "text": {"hidden_size": 48, "head_dim": 24},
    },
}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idefics2_checkpoint(tmp_path_factory.mktemp(request.param), **CONFIGS[request.param])


def padded(sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Random pictures of those (height, width), padded to the largest, and their mask."""
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    pixels = torch.randn(len(sizes), 3, height, width, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(len(sizes), height, width, dtype=torch.int64)
    for i, (h, w) in enumerate(sizes):
        mask[i, :h, :w] = 1
    return pixels * mask[:, None], mask


@pytest.mark.parametrize("sizes", [[(42, 42)], [(21, 37), (42, 23), (30, 40)], [(8, 42), (42, 9), (15, 15)]])
def test_stages_equal_transformers(checkpoint: Path, sizes: list[tuple[int, int]]) -> None:
    model, reference = load_checkpoint(checkpoint), load_reference(Idefics2ForConditionalGeneration, checkpoint)
    pixels, mask = padded(sizes)
    with torch.inference_mode(), tap(reference.model.connector) as seen:
        reference.model.get_image_features(pixels[None], mask[None].bool())
        image_embeds = model.encoder(pixels, mask)
        features = model.connector(image_embeds, mask)
        unmasked = model.connector(image_embeds, torch.ones_like(mask))
    assert_equal(image_embeds, seen[0], "encoder")
    assert_equal(features, seen[1], "connector")
    if len(sizes) > 1:
        assert difference(unmasked, seen[1]) > CAUGHT


def test_language_model_and_all_weights_are_read(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint)
    assert_language_model_equals(model, load_reference(Idefics2ForConditionalGeneration, checkpoint))
    assert unused_weights(model) == []


@pytest.mark.parametrize("side", [1, 4, 9, 70])
def test_places_are_those_of_transformers(side: int) -> None:
    config = Idefics2VisionConfig(hidden_size=1, num_attention_heads=1, image_size=side, patch_size=1)
    make: Any = Idefics2VisionEmbeddings
    embeddings = make(config)
    table = place_table(side)
    with torch.no_grad():
        for parameter in embeddings.patch_embedding.parameters():
            parameter.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(side * side)[:, None])
        for patches in range(1, side + 1):
            mask = torch.zeros(1, side, side, dtype=torch.bool)
            mask[0, :patches, :] = True
            want = embeddings(torch.zeros(1, 3, side, side), mask).reshape(side, side)[:patches]
            got = table[patches, :patches, None] * side + table[side]
            assert torch.equal(got, want.long()), f"{patches} of {side} patches"


def test_a_patch_counts_when_all_of_its_pixels_do() -> None:
    mask = torch.zeros(1, 7, 11, dtype=torch.int64)
    mask[0, :5, :8] = 1
    assert complete_patches(mask, 3).tolist() == [[[1, 1, 0], [0, 0, 0]]]


@pytest.mark.parametrize("stage", ["encoder", "connector"])
def test_exports_with_pictures_of_any_shape(stage: str, tmp_path: Path) -> None:
    export(load_checkpoint(write_idefics2_checkpoint(tmp_path / "checkpoint")), stage, tmp_path)


def test_refuses_an_edge_that_is_no_number(tmp_path: Path) -> None:
    checkpoint = write_idefics2_checkpoint(tmp_path)
    edit_config(checkpoint, **{"vision_config.patch_size": [7, 7]})
    with pytest.raises(CheckpointError, match=r"vision_config.patch_size is \[7, 7\]; this model takes one number"):
        load_checkpoint(checkpoint)
