"""Every family from checkpoint to text against transformers on the same weights; LLaVA has its own file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.checkpoints import write_blip2_checkpoint
from tests.checkpoints_foreign import write_lavis_checkpoint, write_minigpt4_checkpoint
from tests.checkpoints_idefics2 import write_idefics2_checkpoint
from tests.checkpoints_idefics3 import write_idefics3_checkpoint
from tests.checkpoints_internvl import write_internvl_checkpoint
from tests.checkpoints_llava_video import write_llava_next_video_checkpoint, write_llava_onevision_checkpoint
from tests.checkpoints_qwen2_vl import write_qwen2_vl_checkpoint
from tests.checkpoints_qwen_vl import write_qwen_vl_checkpoint
from tests.checkpoints_t5 import T5_CONFIGS, write_blip2_t5_checkpoint

import bridgeport.export.checkpoint as export
from bridgeport.bundle import Bundle
from bridgeport.export import export_checkpoint
from bridgeport.runtime import Pipeline, check_parity
from bridgeport.runtime.parity.stages import BundleStages

NEW_TOKENS = 5
# Stage values against PyTorch's, by the RMS of PyTorch's value.
LIMIT = 5e-5

Write = Callable[[Path], Any]


def _lavis(directory: Path) -> None:
    source = write_blip2_checkpoint(directory.parent / "transformers", text="opt")
    write_lavis_checkpoint(directory, source)


# Tiles, positions and a resolution from outside the graph, an encoder-decoder; one export each takes most of the time.
FAST: dict[str, Write] = {
    "internvl": write_internvl_checkpoint,
    "qwen2.5-vl": lambda path: write_qwen2_vl_checkpoint(path, "2.5"),
    "t5": lambda path: write_blip2_t5_checkpoint(path, **T5_CONFIGS["flan"]),
}
SLOW: dict[str, Write] = {
    "idefics2": write_idefics2_checkpoint,
    "minigpt4": lambda path: write_minigpt4_checkpoint(path, max_position_embeddings=512),
    "onevision": write_llava_onevision_checkpoint,
    "qwen-vl, chat": lambda path: write_qwen_vl_checkpoint(path, chat=True),
    "idefics2, quarters, odd": lambda path: write_idefics2_checkpoint(path, splitting=True, tie=True, seed=4),
    "idefics3": write_idefics3_checkpoint,
    "idefics3, not cut": lambda path: write_idefics3_checkpoint(path, splitting=False, seed=5),
    "smolvlm": lambda path: write_idefics3_checkpoint(path, smol=True, tie=True, seed=6),
    "internvl, tied": lambda path: write_internvl_checkpoint(path, tie=True, max_tiles=6, seed=7),
    "next-video, pictures": write_llava_next_video_checkpoint,
    "onevision, clip": lambda path: write_llava_onevision_checkpoint(path, tower="clip", layer=-2, seed=8),
    "qwen-vl": lambda path: write_qwen_vl_checkpoint(path, seed=1),
    "qwen-vl, odd": lambda path: write_qwen_vl_checkpoint(
        path, patch=5, image_size=33, queries=9, width=40, heads=5, hidden_size=256, vision_layers=3, seed=2
    ),
    "qwen-vl, one width": lambda path: write_qwen_vl_checkpoint(
        path, chat=True, width=128, heads=2, patch=2, image_size=32, layers=3, shards=3, dtype="float16", seed=3
    ),
    "qwen2-vl": lambda path: write_qwen2_vl_checkpoint(path, "2"),
    "qwen2-vl, tied, new names": lambda path: write_qwen2_vl_checkpoint(path, "2", tie=True, names="new", seed=9),
    "qwen2.5-vl, tied": lambda path: write_qwen2_vl_checkpoint(path, "2.5", tie=True, seed=10),
    "lavis": _lavis,
    "minigpt4, odd": lambda path: write_minigpt4_checkpoint(
        path, image_size=35, patch_size=7, num_query_tokens=7, max_position_embeddings=512
    ),
    "idefics2, odd tower": lambda path: write_idefics2_checkpoint(
        path,
        vision={"image_size": 45, "patch_size": 5, "num_hidden_layers": 3},
        text={"hidden_size": 48, "head_dim": 24},
        perceiver={"resampler_n_latents": 7, "resampler_depth": 1, "resampler_n_heads": 3, "num_key_value_heads": 3},
        seed=11,
    ),
    "idefics3, by three": lambda path: write_idefics3_checkpoint(
        path,
        scale_factor=3,
        vision={"image_size": 47, "patch_size": 5},
        text={"hidden_size": 48, "head_dim": 24},
        seed=12,
    ),
    "internvl, quarters": lambda path: write_internvl_checkpoint(
        path, vision={"image_size": [40, 40], "patch_size": [5, 5], "use_qk_norm": True}, downsample_ratio=0.25, seed=13
    ),
    "next-video, odd": lambda path: write_llava_next_video_checkpoint(path, vision={"image_size": 35}, seed=14),
    "onevision, odd": lambda path: write_llava_onevision_checkpoint(path, vision={"image_size": 35}, tie=True, seed=15),
    "qwen2-vl, by three": lambda path: write_qwen2_vl_checkpoint(
        path, "2", vision={"spatial_merge_size": 3, "temporal_patch_size": 1, "num_heads": 4}, seed=16
    ),
    **{
        f"t5, {name}": lambda path, name=name: write_blip2_t5_checkpoint(path, **T5_CONFIGS[name])  # type: ignore[misc]
        for name in T5_CONFIGS
        if name != "flan"
    },
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [picture(40, 90), picture(28, 28, 1), picture(91, 33, 2)]
PROMPTS = ["", "what is this?", "hi"]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_stage_and_greedy_tokens_equal_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "lint_stages", lambda *_: None)  # takes half the time, and has tests of its own
    checkpoint = tmp_path / "checkpoint"
    (FAST | SLOW)[name](checkpoint)
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle")
    report = check_parity(bundle, checkpoint, images=PICTURES, prompts=PROMPTS, threads=1, max_new_tokens=NEW_TOKENS)
    assert report.passed, [(stage.name, stage.isolated.worst, stage.chained.worst) for stage in report.stages]
    assert report.tokens_match
    for stage in report.stages:
        assert stage.isolated.worst.max_rel <= LIMIT, stage.name
    with Pipeline.load(bundle, threads=1) as pipeline:
        rows = pipeline.generate(PICTURES, PROMPTS, max_new_tokens=NEW_TOKENS)
        alone = [pipeline.generate(*one, max_new_tokens=NEW_TOKENS) for one in zip(PICTURES, PROMPTS, strict=True)]
    assert [row.token_ids for row in rows] == [row.token_ids for row in alone]
    assert [list(row.token_ids) for row in rows] == [list(case.reference_ids) for case in report.cases]
    assert len({row.token_ids for row in rows}) > 1, "rows that answer alike prove nothing: choose another seed"
    if bundle.manifest.video is not None:
        check_videos(bundle, checkpoint, monkeypatch)


def check_videos(bundle: Bundle, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity on videos of two lengths beside a picture, and with the frames of one turned round."""
    films = [[picture(40, 31, 10 * count + frame) for frame in range(count)] for count in (3, 2)]
    options: dict[str, Any] = {"images": PICTURES[:1], "videos": films, "prompts": PROMPTS, "threads": 1}
    report = check_parity(bundle, checkpoint, max_new_tokens=NEW_TOKENS, **options)
    assert report.passed, [(stage.name, stage.isolated.worst, stage.chained.worst) for stage in report.stages]
    assert [case.picture for case in report.cases[1:]] == ["video of 3 frames", "video of 2 frames"]
    assert all(stage.isolated.worst.max_rel <= LIMIT for stage in report.stages)
    prepare = BundleStages.prepare

    def turned(self: BundleStages, cases: Any) -> Any:
        made = prepare(self, cases)
        last = {name: tensor[::-1] for name, tensor in made[-1].tensors.items()}
        return [*made[:-1], replace(made[-1], tensors=last)]

    monkeypatch.setattr(BundleStages, "prepare", turned)
    report = check_parity(bundle, checkpoint, max_new_tokens=1, **options)
    assert report.first_divergence == "pixels"
    assert {stage.name: stage.isolated.worst_case for stage in report.stages}["pixels"] == "case 3"
