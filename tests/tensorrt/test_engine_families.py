"""Language models that read an encoder or pictures beside their tokens, as TensorRT engines over the doubles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoints_idefics import IDEFICS_CONFIGS, write_idefics_checkpoint
from tests.checkpoints_t5 import T5_CONFIGS, write_blip2_t5_checkpoint
from tests.tensorrt.engines import install_doubles, write_engines

from bridgeport.bundle import Bundle
from bridgeport.export import checkpoint as export
from bridgeport.export.preflight.corners import Limits
from bridgeport.export.preflight.fix import fix_bundle
from bridgeport.models.small.pictures import held_out
from bridgeport.runtime import Pipeline
from bridgeport.runtime.backends import EngineOptions
from bridgeport.runtime.tensorrt import load_engines
from bridgeport.runtime.tensorrt.concatenated import ConcatenatedTensorRtEngine

CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "t5": lambda path: write_blip2_t5_checkpoint(path, **T5_CONFIGS["odd"]),
    "idefics": lambda path: write_idefics_checkpoint(path, **IDEFICS_CONFIGS["small"]),
}
PROMPTS = ["what is this", "is this a red shape in", "shape"]


def answers(pipeline: Pipeline) -> list[Any]:
    """A batch of prompts of different length, and one alone."""
    images = [example.image for example in held_out(len(PROMPTS))]
    options: dict[str, Any] = {"ignore_eos": True, "max_new_tokens": 6}
    rows = [*pipeline.generate(images, PROMPTS, **options), pipeline.generate(images[1], PROMPTS[1], **options)]
    return [list(row.token_ids) for row in rows]


@pytest.mark.slow  # exports a checkpoint
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_tokens_are_those_of_onnxruntime(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`preflight --fix` writes the decoder in operators of ai.onnx; its engine gives the tokens of the first graph."""
    monkeypatch.setattr(export, "lint_stages", lambda *_: None)
    source = export.export_checkpoint(CHECKPOINTS[family](tmp_path / "checkpoint"), tmp_path / "bundle")
    with Pipeline.load(source, threads=1) as pipeline:
        expected = answers(pipeline)
    profiles = ["batch=1,1,3"]
    report = fix_bundle(source, tmp_path / "fixed", profiles=profiles, limits=Limits(4 << 30, 2.0), threads=1)
    assert report.after.passed
    assert ("llm", "repaired") in {(one.stage, one.status) for one in report.repairs}
    fixed = Bundle.load(tmp_path / "fixed")
    assert fixed.manifest.target == "tensorrt"
    doubles = install_doubles(monkeypatch, tmp_path)
    engines = write_engines(fixed, tmp_path / "engines", doubles.api, profiles=profiles)
    options = EngineOptions()
    with Pipeline(engines, load_engines(engines, options), options) as pipeline:
        assert isinstance(pipeline.engines["llm"], ConcatenatedTensorRtEngine)
        assert answers(pipeline) == expected
    switched = doubles.tensorrt.of("IExecutionContext.set_optimization_profile_async")
    assert {call.arguments["profile_index"] for call in switched} == {0, 1}, "prefill and decode"
    doubles.tensorrt.check_order()
    assert doubles.cuda.left() == {}
