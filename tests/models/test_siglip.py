"""SigLIP: every stage equals transformers' `SiglipModel` on the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import copy_of, edit_config, edit_weights
from tests.checkpoints_score import SIGLIP_CONFIGS, write_siglip_checkpoint
from tests.models.dual_encoders import (
    CAUGHT,
    OF_RMS,
    check_shapes,
    difference,
    our_values,
    pictures,
    reference_values,
    tokens,
)
from torch import Tensor

from bridgeport.errors import CheckpointError, UnsupportedError
from bridgeport.models import load_checkpoint

GetPath = Callable[[str], Path]


def texts(path: Path, batch: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, padded to the model's positions; the second tensor masks the padding."""
    width = load_checkpoint(path).config.text_config.max_position_embeddings
    return tokens([[9, 40, 7, 30, 1], [5, 1], [8, 8, 8, 1]][:batch], 1, width)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "batch"), [(name, 3) for name in SIGLIP_CONFIGS] + [("siglip", 1)])
def test_stages_equal_transformers(score_checkpoint: GetPath, name: str, batch: int, masked: bool) -> None:
    path = score_checkpoint(name)
    ids, mask = texts(path, batch)
    inputs = (pictures(path, batch), ids, mask if masked else torch.ones_like(mask))
    ours, theirs = our_values(path, *inputs), reference_values(path, *inputs)
    for stage in theirs:
        assert difference(ours[stage], theirs[stage]) <= OF_RMS, f"{name} {stage}"
    check_shapes(path, ours)


def test_the_mask_matters(score_checkpoint: GetPath) -> None:
    """Or the test above would pass without it."""
    tower = load_checkpoint(score_checkpoint("siglip")).load_stage("text_encoder")
    ids, mask = texts(score_checkpoint("siglip"), 3)
    with torch.no_grad():
        assert difference(tower(ids, mask), tower(ids, torch.ones_like(mask))) > CAUGHT


@pytest.mark.parametrize(
    ("stage", "tensor"),
    [
        ("encoder", "vision_model.post_layernorm.weight"),
        ("connector", "vision_model.head.probe"),
        ("connector", "vision_model.head.attention.in_proj_weight"),
        ("connector", "vision_model.head.mlp.fc1.weight"),
        ("text_encoder", "text_model.head.weight"),
        ("text_encoder", "text_model.embeddings.position_embedding.weight"),
    ],
)
def test_a_changed_weight_shows(score_checkpoint: GetPath, tmp_path: Path, stage: str, tensor: str) -> None:
    path = score_checkpoint("siglip")
    changed = copy_of(path, tmp_path / "changed")
    edit_weights(changed, lambda state: state[tensor][..., 0].mul_(1.5))
    inputs = (pictures(path, 3), *texts(path, 3))
    assert difference(our_values(changed, *inputs)[stage], reference_values(path, *inputs)[stage]) > CAUGHT


@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 9), marks=pytest.mark.slow)])
def test_random_shapes(tmp_path: Path, seeds: range) -> None:
    random = torch.Generator().manual_seed(seeds.start)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    for seed in seeds:
        heads, text_heads = draw(1, 4), draw(1, 4)
        path = write_siglip_checkpoint(
            tmp_path / str(seed),
            seed=seed,
            image_size=draw(17, 60),
            patch_size=draw(5, 17),
            vision_heads=heads,
            hidden_size=heads * draw(5, 12),
            vision_layers=draw(1, 3),
            text_heads=text_heads,
            text_hidden_size=text_heads * draw(5, 12),
            text_layers=draw(1, 3),
            max_length=draw(6, 40),
        )
        inputs = (pictures(path, 3), *texts(path, 3))
        ours, theirs = our_values(path, *inputs), reference_values(path, *inputs)
        for stage in theirs:
            assert difference(ours[stage], theirs[stage]) <= OF_RMS, f"{seed} {stage}"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vision_config.model_type": "vit"}, UnsupportedError, "the vision tower is a 'vit'"),
        ({"vision_config.vision_use_head": False}, UnsupportedError, "vision_use_head is false"),
        (
            {"text_config.projection_size": 31},
            CheckpointError,
            "projection_size is 31 and vision_config.hid",
        ),
    ],
)
def test_bad_configs(
    score_checkpoint: GetPath, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = copy_of(score_checkpoint("siglip"), tmp_path / "bad")
    edit_config(path, **change)
    with pytest.raises(error, match=message):
        load_checkpoint(path)
