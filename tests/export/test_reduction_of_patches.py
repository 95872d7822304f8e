"""`export --reduce-tokens pool:S` where a picture has as many tokens as it is large: Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.checkpoints_qwen2_vl import Generation, write_qwen2_vl_checkpoint

import bridgeport.export.checkpoint as export
from bridgeport.cli import main
from bridgeport.errors import UnsupportedError
from bridgeport.export import export_checkpoint
from bridgeport.image_contract import ImageContract, Patches
from bridgeport.models.families import FAMILIES
from bridgeport.models.reduction import reduce_layout
from bridgeport.models.reduction_contract import parse_reduction
from bridgeport.runtime import Pipeline, check_parity
from bridgeport.runtime.parity.alter import fit_placeholders, pool
from bridgeport.runtime.parity.reference import Reference

GENERATIONS: tuple[Generation, ...] = ("2", "2.5")
LIMIT = 5e-5
NOTE = "transformers knows no pool:2: parity's own statement of it is applied to transformers' connector"
Bundles = Callable[[Generation], tuple[Path, Path]]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise; a token is 14 x 14 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Checkpoint and bundle with pool:2, made once."""
    done: dict[str, tuple[Path, Path]] = {}

    def get(generation: Generation) -> tuple[Path, Path]:
        if generation not in done:
            root = tmp_path_factory.mktemp("pooled")
            checkpoint = write_qwen2_vl_checkpoint(root / "checkpoint", generation)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(export, "lint_stages", lambda *_: None)
                export_checkpoint(checkpoint, root / "bundle", reduce_tokens="pool:2")
            done[generation] = checkpoint, root / "bundle"
        return done[generation]

    return get


def with_stride(bundle: Path, copy: Path, **tiling: int) -> Path:
    """A copy whose image contract says something else."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["image"]["tiling"]["pool_stride"] == 2
    manifest["image"]["tiling"] |= tiling
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return copy


def check(bundle: Path, checkpoint: Path, *pictures: Image.Image) -> Any:
    prompts = ["", "what is this?", "hi"][: len(pictures)]
    return check_parity(bundle, checkpoint, images=list(pictures), prompts=prompts, threads=1, max_new_tokens=6)


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_from_checkpoint_to_text(exported: Bundles, generation: Generation, capsys: pytest.CaptureFixture[str]) -> None:
    """3 x 5, 5 x 6 and 2 x 2 features: windows that both edges, one or none cut off."""
    checkpoint, bundle = exported(generation)
    pictures, prompts = [picture(70, 42), picture(84, 70, 1), picture(28, 28, 2)], ["", "what is this?", "hi"]
    report = check(bundle, checkpoint, *pictures)
    assert report.passed, report.summary()
    assert report.tokens_match
    assert report.notes == (NOTE,)
    for stage in report.stages:
        assert stage.isolated.worst.max_rel <= LIMIT, stage.name
    with Pipeline.load(bundle, threads=1) as pipeline:
        assert str(pipeline.manifest.reduction) == "pool:2"
        assert [len(pipeline.prepare_picture(one).rows) for one in pictures] == [6, 9, 1]
        together = pipeline.generate(pictures, prompts, max_new_tokens=6)
        alone = [pipeline.generate(*pair, max_new_tokens=6) for pair in zip(pictures, prompts, strict=True)]
    assert [row.token_ids for row in together] == [row.token_ids for row in alone]
    assert [tuple(row.token_ids) for row in together] == [case.reference_ids for case in report.cases]
    assert main(["tokens", str(bundle), "--image-size", "70x42", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert (model["pictures"][0]["features"], model["pictures"][0]["tokens"]) == (15, 6)
    assert model["connector"] == "MergerConnector"


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_two_pictures_in_a_prompt(exported: Bundles, generation: Generation) -> None:
    """Each has its own grid; what stands behind the first goes on from the smaller one."""
    checkpoint, bundle = exported(generation)
    pictures = [picture(70, 42), picture(84, 70, 1)]
    with Pipeline.load(bundle, threads=1) as pipeline:
        (ours,) = pipeline.generate([pictures], ["{image}one{image}what?"], interleave=True, max_new_tokens=6)
    reference = Reference.load(checkpoint, parse_reduction("pool:2"))
    content = [{"type": "image"}, {"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "what?"}]
    turn = [{"role": "user", "content": content}]
    text = reference.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    inputs = reference.processor(images=pictures, text=[text], return_tensors="pt")
    tokens = {15: 6, 30: 9}  # 3 x 5 and 5 x 6 features
    inputs = fit_placeholders(inputs, reference.model.config.image_token_id, lambda count, _: tokens[count])
    found = reference.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=6)[0].tolist()
    assert list(ours.token_ids) == found[inputs["input_ids"].shape[1] :]


@pytest.mark.slow
def test_in_pytorch(exported: Bundles) -> None:
    checkpoint, bundle = exported("2")
    options: dict[str, Any] = {"max_new_tokens": 4}
    with Pipeline.load(bundle, threads=1) as pipeline:
        rows = pipeline.generate([picture(70, 42), picture(84, 70, 1)], "what?", **options)
    with Pipeline.load(bundle, engine="torch", checkpoint=checkpoint) as pipeline:
        again = pipeline.generate([picture(70, 42), picture(84, 70, 1)], "what?", **options)
    assert [row.token_ids for row in again] == [row.token_ids for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "stride", "size", "where"),
    [("2", 3, (70, 42), "placeholder_ids"), ("2", 1, (70, 42), "placeholder_ids"),
     ("2", 3, (56, 56), "merged_embeddings"), ("2.5", 3, (56, 56), "merged_embeddings")],
)  # fmt: skip
def test_parity_sees_a_wrong_stride(
    exported: Bundles, tmp_path: Path, generation: Generation, stride: int, size: tuple[int, int], where: str
) -> None:
    """Planted fault. Of 4 x 4 features, windows of 2 and of 3 are equally many: the embeddings alone tell."""
    checkpoint, bundle = exported(generation)
    report = check(with_stride(bundle, tmp_path / "copy", pool_stride=stride), checkpoint, picture(*size))
    assert not report.passed
    assert report.first_divergence == where, report.summary()


@pytest.mark.slow
def test_parity_sees_a_reduction_that_the_manifest_forgot(exported: Bundles, tmp_path: Path) -> None:
    checkpoint, bundle = exported("2")
    copy = with_stride(bundle, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    (copy / "manifest.json").write_text(json.dumps(manifest | {"reduction": None}), encoding="utf-8")
    report = check(copy, checkpoint, picture(70, 42))
    assert not report.passed
    assert report.first_divergence == "placeholder_ids"


@pytest.mark.slow
def test_parity_sees_positions_of_the_whole_grid(exported: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: a token has the place of its window's first feature."""
    checkpoint, bundle = exported("2")
    monkeypatch.setattr("bridgeport.runtime.mrope.rope_index", spread)
    report = check(bundle, checkpoint, picture(70, 42))
    assert report.first_divergence == "first_logits", report.summary()


def spread(length: int, images: Any) -> Any:
    from bridgeport.runtime import mrope

    found = np.repeat(np.arange(length)[None], mrope.AXES, axis=0)
    for image in images:
        end = image.start + int(np.prod(image.grid))
        found[:, image.start : end] = image.start + 2 * np.indices(image.grid).reshape(mrope.AXES, -1)
    return found


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("reduction", "why"), [("tome:2", "are no fixed number"), ("queries:4", "has no learned queries")]
)
def test_other_reductions_are_refused(model_type: str, reduction: str, why: str) -> None:
    (architecture,) = FAMILIES[model_type].layouts
    layout = FAMILIES[model_type].layout(architecture)(config_of(model_type))
    with pytest.raises(
        UnsupportedError, match=rf"^reduce-tokens {reduction} is not built for a qwen2.*{why}.*use pool:S$"
    ):
        reduce_layout(layout, parse_reduction(reduction))
    pooled = reduce_layout(layout, parse_reduction("pool:3"))
    assert (pooled.contracts, pooled.stages) == (layout.contracts, layout.stages)
    assert str(pooled.reduction) == "pool:3"


def config_of(model_type: str) -> Any:
    config = FAMILIES[model_type].config_type()()
    width = "hidden_size" if model_type == "qwen2_vl" else "out_hidden_size"
    setattr(config.vision_config, width, config.text_config.hidden_size)
    return config


def test_a_contract_without_the_field_pools_nothing() -> None:
    stored = {
        "steps": [], "tiling": {
            "kind": "patches", "patch_size": 7, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 784,
            "max_pixels": 7056, "resample": "bicubic", "window_size": None,
        },
    }  # fmt: skip
    tiling = ImageContract.model_validate(stored).tiling
    assert isinstance(tiling, Patches)
    assert tiling.pool_stride == 1


def test_parity_s_own_pooling_by_hand() -> None:
    """2 x 3 tokens: of the third column, half a window."""
    tokens = np.array([[1.0], [2.0], [3.0], [5.0], [6.0], [9.0]], np.float32)
    assert pool(tokens, 2, 2).tolist() == [[3.5], [6.0]]
