"""The one-layer Q-Former from checkpoint to text, in LLaVA's place and BLIP-2's, against torch's own modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.checkpoints import write_blip2_checkpoint
from tests.checkpoints_llava import write_llava_checkpoint
from tests.models.connectors import prepare
from tests.models.test_simplified_qformer import reference

import bridgeport.export.checkpoint as export
from bridgeport.cli import main
from bridgeport.errors import CheckpointError
from bridgeport.export import export_checkpoint
from bridgeport.models import load_checkpoint
from bridgeport.models.simplified_qformer import SimplifiedQFormer, SimplifiedQFormerConnector
from bridgeport.runtime import Pipeline, check_parity

Write = Callable[[Path], Path]

# Name -> writer of a checkpoint, sizes of the connector.
CASES: dict[str, tuple[Write, dict[str, int]]] = {
    "llava": (write_llava_checkpoint, {"width": 48, "num_heads": 3, "num_queries": 5}),
    "llava, two layers, odd": (
        lambda path: write_llava_checkpoint(path, layer=[-2, 1], select="full", vision={"image_size": 35}, seed=3),
        {"width": 40, "num_heads": 8, "num_queries": 33},
    ),
    "blip-2, opt": (
        lambda path: write_blip2_checkpoint(path, text="opt", qformer_layers=1),
        {"width": 24, "num_heads": 1, "num_queries": 1},
    ),
    "blip-2, llama": (
        lambda path: write_blip2_checkpoint(path, text="llama", qformer_layers=1, image_size=35, patch_size=7),
        {"width": 56, "num_heads": 7, "num_queries": 9},
    ),
}
QUICK = "llava"


def with_one_layer(checkpoint: Path, sizes: Any, seed: int = 0) -> Path:
    """The checkpoint, its connector replaced."""
    import transformers

    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"bridgeport_connector": "simplified-qformer", "simplified_qformer": sizes}
    (checkpoint / "config.json").write_text(json.dumps(config))
    make: Any = transformers.AutoConfig
    connector = prepare(SimplifiedQFormerConnector(make.from_pretrained(checkpoint)), seed)
    weights = load_file(checkpoint / "model.safetensors")
    weights |= {f"connector.{name}": tensor.contiguous() for name, tensor in connector.state_dict().items()}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [picture(40, 90), picture(28, 28, 1), picture(91, 33, 2)]
PROMPTS = ["", "what is this?", "hi"]


@pytest.mark.parametrize(
    "name", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != QUICK)]
)
def test_every_stage_and_greedy_tokens_equal_torch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "lint_stages", lambda *_: None)
    write, sizes = CASES[name]
    checkpoint = with_one_layer(write(tmp_path / "checkpoint"), sizes)
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle")
    assert bundle.manifest.custom_connector == "simplified-qformer"
    # Both sides of parity would run our module: here the other side is torch.nn.MultiheadAttention and its like.
    monkeypatch.setattr(SimplifiedQFormer, "forward", reference)
    report = check_parity(bundle, checkpoint, images=PICTURES, prompts=PROMPTS, threads=1, max_new_tokens=5)
    assert report.passed, report.summary()
    assert report.tokens_match
    assert all(stage.isolated.worst.max_rel <= 5e-5 for stage in report.stages)
    with Pipeline.load(bundle, threads=1) as pipeline:
        assert pipeline.encode(PICTURES[0]).shape[1] == sizes["num_queries"]
        rows = pipeline.generate(PICTURES, PROMPTS, max_new_tokens=5)
    assert [list(row.token_ids) for row in rows] == [list(case.reference_ids) for case in report.cases]
    if name == QUICK:
        monkeypatch.setattr(
            SimplifiedQFormer, "forward", lambda self, features: reference(self, features, post_norm=False)
        )
        assert not check_parity(bundle, checkpoint, images=PICTURES, prompts=PROMPTS, threads=1).passed
        quantise(bundle.path, tmp_path)


def quantise(bundle: Path, folder: Path) -> None:
    """The attention and the feed-forward are found and get their Q/DQ."""
    (folder / "pictures").mkdir()
    for number in range(8):
        picture(40, 90, number).save(folder / "pictures" / f"{number}.png")
    options = ["--calibration", str(folder / "pictures"), "--cache", str(folder / "cache"), "--min-cosine", "0.5"]
    out = folder / "int8"
    assert main(["quantize", str(bundle), "-o", str(out), "--precision", "int8", "--target", "tensorrt", *options]) == 0
    with Pipeline.load(out, threads=1) as pipeline:
        assert pipeline.manifest.stage("connector").precision == "int8"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"queries": 3}, r"simplified_qformer is \{'queries': 3\}; accepted is an object of width, num_heads, num_que"),
        (32, r"simplified_qformer is 32; accepted is an object"),
        ({"num_queries": 0}, r"simplified_qformer: num_queries is 0; accepted is a whole number from 1"),
        ({"width": 48, "num_heads": 5}, r"attention of width 48 cannot be split into 5 heads"),
    ],
)
def test_sizes_that_are_none(tmp_path: Path, sizes: Any, message: str) -> None:
    checkpoint = with_one_layer(write_llava_checkpoint(tmp_path / "checkpoint"), {"width": 24})
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"simplified_qformer": sizes}))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)


def test_weights_of_another_size(tmp_path: Path) -> None:
    checkpoint = with_one_layer(write_llava_checkpoint(tmp_path / "checkpoint"), {"width": 24, "num_heads": 2})
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"simplified_qformer": {"width": 32}}))
    with pytest.raises(
        CheckpointError,
        match=r"connector\.projection\.weight has shape \[32, 24\], but config.json asks for \[32, 32\]",
    ):
        load_checkpoint(checkpoint)


def test_defaults_need_no_sizes(tmp_path: Path) -> None:
    checkpoint = with_one_layer(write_llava_checkpoint(tmp_path / "checkpoint"), {})
    model = load_checkpoint(checkpoint)
    assert model.contracts["connector"].outputs[0].shape == ("batch", 32, 32)
    assert model.connector.get_parameter("qformer.query_tokens").shape == (1, 32, 768)
