"""The worked example of docs/custom-connectors.md, from outside the package: code, checkpoint, export, run, parity."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.checkpoints import write_blip2_checkpoint
from tests.checkpoints_llava import write_llava_checkpoint

import bridgeport.export.checkpoint as export
from bridgeport.cli import main
from bridgeport.export import export_checkpoint
from bridgeport.models import registry
from bridgeport.runtime import Pipeline, check_parity

PAGE = Path(__file__).parents[2] / "docs" / "custom-connectors.md"
MORE = '''

@register_connector("two-queries", architectures=["Blip2ForConditionalGeneration"], tokens=2)
class TwoQueries(nn.Module):
    """More than one layer, a norm, and other tokens than the checkpoint's processor counts."""

    def __init__(self, config) -> None:
        super().__init__()
        width = config.vision_config.hidden_size
        self.queries = nn.Parameter(torch.randn(2, width))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, image_embeds: Tensor) -> Tensor:
        weights = (self.queries @ image_embeds.transpose(1, 2)).softmax(dim=-1)
        return self.linear(self.norm(weights @ image_embeds))

    def keep_queries(self, count: int) -> None:
        self.queries = nn.Parameter(self.queries[:count].detach().clone())
'''


def blocks() -> tuple[str, str]:
    """The page's module, and its code that makes the checkpoint."""
    module, checkpoint, *more = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert not more
    return module, checkpoint


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`my_connectors` as pip leaves it, with the page's entry point and a second one."""
    site = tmp_path / "site"
    metadata = site / "my_connectors-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "my_connectors.py").write_text("import torch\n" + blocks()[0] + MORE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-connectors\nVersion: 1.0\n")
    entry = re.search(r'\[project.entry-points."(.*?)"\]\n(.*?) = "(.*?)"\n', PAGE.read_text())
    assert entry is not None
    group, name, module = entry.groups()
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\ntwo-queries = {module}\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.setattr(export, "lint_stages", lambda *_: None)
    yield
    sys.modules.pop("my_connectors", None)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def check_chain(checkpoint: Path, bundle: Path, name: str) -> None:
    report = check_parity(bundle, checkpoint, images=[picture(40, 90), picture(91, 13, 1)], prompts=["", "what?"],
                          threads=1, max_new_tokens=6)  # fmt: skip
    assert report.passed, report.summary()
    assert report.tokens_match
    assert all(stage.isolated.worst.max_rel <= 5e-5 for stage in report.stages)
    assert len(report.notes) == 1
    assert report.notes[0].startswith(f"transformers has no connector '{name}': its module")


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process: nothing is registered or imported."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    sys.modules.pop("my_connectors", None)


def test_the_worked_example(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llava_checkpoint(tmp_path / "llava", vision={"num_hidden_layers": 2}, text={"num_hidden_layers": 1})
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(blocks()[1], str(PAGE), "exec"), {})
    assert json.loads(Path("my-llava/config.json").read_text())["bridgeport_connector"] == "conv-projector"
    forget(monkeypatch)
    assert main(["export", "my-llava", "-o", "bundle", "--json"]) == 0
    check_chain(Path("my-llava"), Path("bundle"), "conv-projector")
    sys.modules.pop("my_connectors", None)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry) != tmp_path / "site"])
    quantise_for_tensorrt(tmp_path)
    with Pipeline.load("bundle", threads=1) as pipeline:
        assert pipeline.manifest.custom_connector == "conv-projector"
        assert pipeline.encode(picture(30, 30)).shape == (1, 4, 32)
        assert pipeline.generate(picture(30, 30), "what?", max_new_tokens=2).token_ids
    assert "my_connectors" not in sys.modules


def quantise_for_tensorrt(folder: Path) -> None:
    """Without the connector's code: a bundle is all that quantising needs."""
    (folder / "pictures").mkdir()
    for number in range(8):
        picture(40, 90, number).save(folder / "pictures" / f"{number}.png")
    options = ["--calibration", str(folder / "pictures"), "--cache", str(folder / "cache"), "--min-cosine", "0.5"]
    assert main(["quantize", "bundle", "-o", "int8", "--precision", "int8", "--target", "tensorrt", *options]) == 0
    with Pipeline.load("int8", threads=1) as pipeline:
        assert pipeline.manifest.custom_connector == "conv-projector"
        assert pipeline.manifest.stage("connector").precision == "int8"
        assert pipeline.generate(picture(30, 30), "what?", max_new_tokens=2).token_ids


@pytest.mark.slow
def test_in_the_place_of_a_qformer(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BLIP-2, and with fewer tokens."""
    import transformers

    checkpoint = write_blip2_checkpoint(tmp_path / "c", vision_layers=1, qformer_layers=1, num_layers=1)
    make: Any = transformers.Blip2ForConditionalGeneration
    model = make.from_pretrained(checkpoint)
    model.connector = registry.find_connector("two-queries").factory(model.config)
    model.config.bridgeport_connector = "two-queries"
    model.save_pretrained(checkpoint)
    export_checkpoint(checkpoint, tmp_path / "bundle")
    check_chain(checkpoint, tmp_path / "bundle", "two-queries")
    reduced = export_checkpoint(checkpoint, tmp_path / "reduced", reduce_tokens="tome:1")
    report = check_parity(reduced, checkpoint, images=[picture(40, 90)], prompts=["hi"], threads=1, max_new_tokens=3)
    assert report.passed, report.summary()
    assert len(report.notes) == 2
    reduced = export_checkpoint(checkpoint, tmp_path / "first", reduce_tokens="queries:1")
    report = check_parity(reduced, checkpoint, images=[picture(40, 90)], prompts=["hi"], threads=1, max_new_tokens=3)
    assert report.passed, report.summary()
    assert report.notes[1].endswith("'two-queries' leaves the queries out by its own keep_queries, as in the export")
    with Pipeline.load(reduced, threads=1) as pipeline:
        assert pipeline.encode(picture(30, 30)).shape[1] == 1
