"""LLaVA and LLaVA-NeXT from checkpoint to text, against transformers on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.checkpoints_llava import write_llava_checkpoint

import bridgeport.export.checkpoint as export
from bridgeport.errors import InputError
from bridgeport.export import export_checkpoint
from bridgeport.runtime import Pipeline, check_parity

NEW_TOKENS = 6
# Stage values against PyTorch's, by the RMS of PyTorch's value.
LIMIT = 5e-5


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Transformers:
    """The checkpoint's own model and processor, with pictures in front of the prompt or at its `<image>`s."""

    def __init__(self, checkpoint: Path) -> None:
        import transformers

        make: Any = transformers.AutoModelForImageTextToText
        self.model = make.from_pretrained(checkpoint, dtype=torch.float32).eval()
        make_processor: Any = transformers.AutoProcessor
        self.processor = make_processor.from_pretrained(checkpoint, backend="pil")

    def generate(self, images: list[Image.Image], text: str) -> list[int]:
        """New greedy tokens of one user turn."""
        inputs = self.processor(images=[images] if images else None, text=[text], return_tensors="pt")
        with torch.no_grad():
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0]
        return [int(i) for i in ids[inputs["input_ids"].shape[1] :]]


def turn(text: str) -> str:
    return f"USER: {text} ASSISTANT:"


@pytest.fixture(scope="module", params=["llava", "llava-next"])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Pipeline]]:
    """Checkpoint and loaded bundle."""
    root = tmp_path_factory.mktemp(request.param)
    checkpoint = write_llava_checkpoint(root / "checkpoint", anyres=request.param == "llava-next")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "lint_stages", lambda *_: None)
        export_checkpoint(checkpoint, root / "bundle")
    with Pipeline.load(root / "bundle", threads=1) as pipeline:
        yield checkpoint, pipeline


def test_parity(chain: tuple[Path, Pipeline]) -> None:
    checkpoint, pipeline = chain
    check_all_stages(checkpoint, pipeline.bundle.path)


def check_all_stages(checkpoint: Path, bundle: Path) -> None:
    shapes = [picture(40, 90), picture(28, 28, 1), picture(91, 13, 2)]
    report = check_parity(bundle, checkpoint, images=shapes, prompts=["", "what is this?", "hi"], threads=1)
    assert report.passed, [(stage.name, stage.isolated.worst, stage.chained.worst) for stage in report.stages]
    assert report.tokens_match
    for stage in report.stages:
        assert stage.isolated.worst.max_rel <= LIMIT, stage.name


def test_greedy_tokens_of_pictures_of_different_shapes_in_one_batch(chain: tuple[Path, Pipeline]) -> None:
    checkpoint, pipeline = chain
    reference = Transformers(checkpoint)
    images = [picture(40, 90), picture(28, 28, 1), picture(91, 13, 2)]
    prompts = ["what?", "a longer question about this", ""]
    expected = [reference.generate([one], turn(f"<image>\n{text}")) for one, text in zip(images, prompts, strict=True)]
    rows = pipeline.generate(images, prompts, max_new_tokens=NEW_TOKENS)
    assert [list(row.token_ids) for row in rows] == expected
    assert len({tuple(row) for row in expected}) == 3, "rows that answer alike prove nothing: choose another seed"


def test_several_pictures_in_one_prompt_and_none(chain: tuple[Path, Pipeline]) -> None:
    checkpoint, pipeline = chain
    reference = Transformers(checkpoint)
    pair = [picture(40, 90), picture(28, 28, 1)]
    expected = [
        reference.generate(pair, turn("<image>\n<image>\nwhich?")),
        reference.generate(pair[:1], turn("<image>\nwhich?")),
        reference.generate([], turn("which?")),
    ]
    rows = pipeline.generate([pair, pair[:1], []], "which?", max_new_tokens=NEW_TOKENS)
    assert [list(row.token_ids) for row in rows] == expected
    assert list(pipeline.generate(None, "which?", max_new_tokens=NEW_TOKENS).token_ids) == expected[2]
    marked = pipeline.generate([pair], "one {image} two {image}", interleave=True, max_new_tokens=NEW_TOKENS)
    assert list(marked[0].token_ids) == reference.generate(pair, turn("one <image>\n two <image>\n"))


def test_typed_placeholder_text_is_no_picture(chain: tuple[Path, Pipeline]) -> None:
    _, pipeline = chain
    prepared = pipeline.prepare(picture(30, 30), "what does <image> mean?")
    count = len(prepared.pictures[0][0].rows)
    assert len(prepared.image_positions[0]) == count
    assert np.count_nonzero(prepared.input_ids[0] == pipeline.prompt.image_token_id) == count


def test_marks_and_pictures_that_do_not_agree(chain: tuple[Path, Pipeline]) -> None:
    _, pipeline = chain
    with pytest.raises(InputError, match=r"the prompt has 1 \{image\} marks and 2 pictures came"):
        pipeline.generate([[picture(9, 9), picture(9, 9)]], "a {image}", interleave=True)


SHAPES: dict[str, dict[str, Any]] = {
    "one linear layer": {"linear": True},
    "last layer, class token kept": {"layer": -1, "select": "full"},
    "two layers": {"layer": [-2, 1], "vision": {"num_hidden_layers": 4}},
    "siglip": {"tower": "siglip", "layer": -1, "select": "full"},
    "odd patches": {"vision": {"image_size": 33, "patch_size": 11, "hidden_size": 30, "num_attention_heads": 5}},
    "no bias, no template": {"bias": False, "chat_template": None},
    "odd llama": {"text": {"hidden_size": 48, "head_dim": 24, "num_attention_heads": 3, "num_key_value_heads": 1}},
    "next, three rows": {"anyres": True, "grid_pinpoints": [[28, 84], [84, 28], [56, 84]]},
    "next, siglip": {"anyres": True, "tower": "siglip", "select": "full", "layer": -1},
    "next, two layers": {"anyres": True, "layer": [-1, -3]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "lint_stages", lambda *_: None)
    checkpoint = write_llava_checkpoint(tmp_path / "checkpoint", **SHAPES[name], seed=len(name))
    export_checkpoint(checkpoint, tmp_path / "bundle")
    check_all_stages(checkpoint, tmp_path / "bundle")
