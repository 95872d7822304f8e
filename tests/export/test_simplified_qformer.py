"""The one-layer Q-Former from checkpoint to text, in LLaVA's place and BLIP-2's, against torch's own modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.checkpoints import write_blip2_checkpoint
from tests.checkpoints_llava import write_llava_checkpoint
from tests.models.connectors import prepare
from tests.models.test_simplified_qformer import reference

import bridgeport.export.checkpoint as export
from bridgeport.bundle import Bundle
from bridgeport.cli import main
from bridgeport.errors import CheckpointError, InputError
from bridgeport.export import export_checkpoint
from bridgeport.models import load_checkpoint
from bridgeport.models.reduction import reduce_tokens
from bridgeport.models.reduction_contract import Reduction, parse_reduction
from bridgeport.models.simplified_qformer import SimplifiedQFormer, SimplifiedQFormerConnector
from bridgeport.runtime import Pipeline, check_parity
from bridgeport.runtime.parity import alter
from bridgeport.runtime.parity.audit import audit_epsilons
from bridgeport.runtime.parity.names import find_probes
from bridgeport.runtime.parity.reference import Reference

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
        read_the_graph(bundle, checkpoint)
        monkeypatch.setattr(
            SimplifiedQFormer, "forward", lambda self, features: reference(self, features, post_norm=False)
        )
        assert not check_parity(bundle, checkpoint, images=PICTURES, prompts=PROMPTS, threads=1).passed
        with pytest.raises(InputError, match=r"plain has its class's own connector, the bundle the connector 'simpli"):
            check_parity(bundle, write(tmp_path / "plain"), images=PICTURES, prompts=PROMPTS, threads=1)
        quantise(bundle.path, tmp_path)


def read_the_graph(bundle: Bundle, checkpoint: Path) -> None:
    """Parity finds the module's norms in the graph, and an epsilon that is not theirs."""
    reference = Reference.load(checkpoint, custom_connector="simplified-qformer")
    graph = onnx.load(str(bundle.graph("connector")), load_external_data=False).graph
    probes = find_probes("connector", graph, bundle.manifest, reference)
    assert audit_epsilons(graph, probes, reference.model) == ()
    place = f"{reference.taps.image_features.module}.qformer.feed_forward_norm"
    reference.model.get_submodule(place).eps = 1e-3
    (found,) = audit_epsilons(graph, probes, reference.model)
    assert "0.001" in found.text


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
        ([], r"\): simplified_qformer is \[\]; accepted is an object"),
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


def test_the_first_queries_alone(tmp_path: Path) -> None:
    checkpoint = with_one_layer(write_llava_checkpoint(tmp_path / "checkpoint"), {"width": 24, "num_queries": 5})
    model = load_checkpoint(checkpoint)
    reduced = reduce_tokens(model, parse_reduction("queries:2"))
    assert reduced.contracts["connector"].outputs[0].shape == ("batch", 2, 32)
    x = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reduced.connector(x), model.connector(x)[:, :2], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"has 5 learned queries; accepted are queries:1 to queries:5$"):
        reduce_tokens(model, parse_reduction("queries:6"))


def keep_the_last(model: Any, reduction: Reduction, _original: Any, taps: Any) -> None:
    """Planted fault."""
    former = model.get_submodule(taps.image_features.module).qformer
    former.query_tokens = torch.nn.Parameter(former.query_tokens[:, -reduction.amount :].detach())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reduction", "left"), [("llava", "queries:2", 2), ("blip-2, llama", "tome:4", 5)])
def test_fewer_tokens_from_checkpoint_to_text(
    name: str, reduction: str, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "lint_stages", lambda *_: None)
    write, sizes = CASES[name]
    checkpoint = with_one_layer(write(tmp_path / "checkpoint"), sizes)
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle", reduce_tokens=reduction)
    monkeypatch.setattr(SimplifiedQFormer, "forward", reference)
    options: dict[str, Any] = {"images": PICTURES, "prompts": PROMPTS, "threads": 1, "max_new_tokens": 5}
    report = check_parity(bundle, checkpoint, **options)
    assert report.passed, report.summary()
    assert report.tokens_match
    assert all(stage.isolated.worst.max_rel <= 5e-5 for stage in report.stages)
    assert report.notes[1] == (
        f"transformers knows no {reduction}: parity's own statement of it is applied to 'simplified-qformer'"
    )
    with Pipeline.load(bundle, threads=1) as pipeline:
        assert pipeline.encode(PICTURES[0]).shape[1] == left
    monkeypatch.setattr(alter, "_cut_queries", keep_the_last)
    monkeypatch.setattr(alter, "merge", lambda tokens, count: tokens[count:])
    assert check_parity(bundle, checkpoint, **options).first_divergence == "connector"
