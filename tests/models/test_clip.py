"""CLIP: every stage equals transformers' `CLIPModel` on the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import copy_of, edit_config, edit_weights
from tests.checkpoints_score import CLIP_CONFIGS, write_clip_checkpoint
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
    """Rows of different lengths between the start and the end token, padded with the end token as CLIP pads."""
    end = load_checkpoint(path).config.text_config.vocab_size - 1
    rows = [[end - 1, 9, 40, 7, 300, end], [end - 1, 5, end], [end - 1, 8, 8, 8, end]]
    return tokens(rows[:batch], end, 8)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CLIP_CONFIGS)
def test_stages_equal_transformers(score_checkpoint: GetPath, name: str, batch: int) -> None:
    path = score_checkpoint(name)
    inputs = (pictures(path, batch), *texts(path, batch))
    ours, theirs = our_values(path, *inputs), reference_values(path, *inputs)
    for stage in theirs:
        assert difference(ours[stage], theirs[stage]) <= OF_RMS, f"{name} {stage}"
    check_shapes(path, ours)


@pytest.mark.parametrize(
    ("stage", "tensor"),
    [
        ("encoder", "vision_model.encoder.layers.0.mlp.fc2.weight"),
        ("encoder", "vision_model.embeddings.position_embedding.weight"),
        ("connector", "visual_projection.weight"),
        ("text_encoder", "text_model.encoder.layers.0.self_attn.k_proj.weight"),
        ("text_encoder", "text_projection.weight"),
    ],
)
def test_a_changed_weight_shows(score_checkpoint: GetPath, tmp_path: Path, stage: str, tensor: str) -> None:
    path = score_checkpoint("clip")
    changed = copy_of(path, tmp_path / "changed")
    edit_weights(changed, lambda state: state[tensor][..., 0].mul_(1.05))
    inputs = (pictures(path, 3), *texts(path, 3))
    assert difference(our_values(changed, *inputs)[stage], reference_values(path, *inputs)[stage]) > CAUGHT


def test_what_stands_behind_the_end_token_is_not_read(score_checkpoint: GetPath) -> None:
    """Causal: so the padding, whatever it is and however much of it, changes nothing."""
    tower = load_checkpoint(score_checkpoint("clip")).load_stage("text_encoder")
    end = 602
    short, mask = tokens([[601, 40, 7, end]], end, 4)
    long, ones = tokens([[601, 40, 7, end, 3, 3, 3]], end, 7)
    with torch.no_grad():
        assert difference(tower(long, ones), tower(short, mask)) <= OF_RMS


@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 9), marks=pytest.mark.slow)])
def test_random_shapes(tmp_path: Path, seeds: range) -> None:
    random = torch.Generator().manual_seed(seeds.start)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    for seed in seeds:
        heads, text_heads = draw(1, 4), draw(1, 4)
        path = write_clip_checkpoint(
            tmp_path / str(seed),
            seed=seed,
            image_size=draw(17, 60),
            patch_size=draw(5, 17),
            vision_heads=heads,
            vision_hidden_size=heads * draw(5, 12),
            vision_layers=draw(1, 3),
            text_heads=text_heads,
            text_hidden_size=text_heads * draw(5, 12),
            text_layers=draw(1, 3),
            projection_dim=draw(3, 70),
            max_length=draw(8, 40),
        )
        inputs = (pictures(path, 3), *texts(path, 3))
        ours, theirs = our_values(path, *inputs), reference_values(path, *inputs)
        for stage in theirs:
            assert difference(ours[stage], theirs[stage]) <= OF_RMS, f"{seed} {stage}"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vision_config.model_type": "vit"}, UnsupportedError, "the vision tower is a 'vit'"),
        ({"vision_config.image_size": [28, 42]}, CheckpointError, r"image_size is \[28, 42\]; give one number"),
        ({"vision_config.num_channels": 1}, UnsupportedError, "num_channels is 1; pictures are RGB"),
        ({"vision_config.patch_size": 29}, CheckpointError, "patches of 29 pixels do not fit a picture of 28"),
        ({"text_config.eos_token_id": [1, 2]}, CheckpointError, r"eos_token_id is \[1, 2\]; give one number"),
        ({"projection_dim": 17}, CheckpointError, r"tensor (visual|text)_projection\.weight has shape \[16, 32\]"),
    ],
)
def test_bad_configs(
    score_checkpoint: GetPath, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = copy_of(score_checkpoint("clip"), tmp_path / "bad")
    edit_config(path, **change)
    with pytest.raises(error, match=message):
        load_checkpoint(path)


def test_a_missing_logit_scale_is_told(score_checkpoint: GetPath, tmp_path: Path) -> None:
    path = copy_of(score_checkpoint("clip"), tmp_path / "bad")
    edit_weights(path, lambda state: state.pop("logit_scale"))
    with pytest.raises(CheckpointError, match=r"tensor logit_scale of shape \[\] is missing"):
        load_checkpoint(path)
