"""INT4 weights in the language model of families whose decoder stands inside another model, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.checkpoints_idefics2 import write_idefics2_checkpoint
from tests.checkpoints_internvl import write_internvl_checkpoint
from tests.checkpoints_llava_video import write_llava_onevision_checkpoint
from tests.checkpoints_qwen_vl import write_qwen_vl_checkpoint
from tests.runtime.test_families import LIMIT, PICTURES, PROMPTS

import bridgeport.export.checkpoint as export
from bridgeport.export import export_checkpoint
from bridgeport.runtime import Pipeline, check_parity

WRITERS: dict[str, Callable[[Path], Any]] = {
    "idefics2": write_idefics2_checkpoint,
    "internvl": write_internvl_checkpoint,
    "onevision": write_llava_onevision_checkpoint,
    "qwen-vl": lambda path: write_qwen_vl_checkpoint(path, chat=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_int4_weights_are_the_checkpoints_rounded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "lint_stages", lambda *_: None)
    checkpoint = tmp_path / "checkpoint"
    WRITERS[name](checkpoint)
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle", precision="int4")
    assert bundle.manifest.stage("llm").precision == "int4"
    options: dict[str, Any] = {"images": PICTURES, "prompts": PROMPTS, "threads": 1, "max_new_tokens": 2}
    report = check_parity(bundle, checkpoint, **options)
    stages = {stage.name: stage for stage in report.stages}
    # The gate against the checkpoint's own weights is not asked: on random weights rounding to 16 levels turns logits.
    logits = stages.pop("first_logits")
    assert all(stage.passed for stage in stages.values()), report.summary()
    assert logits.findings == ()
    assert logits.same_weights is not None
    assert logits.same_weights.worst.max_rel <= LIMIT
    with Pipeline.load(bundle, threads=1) as pipeline:
        rows = pipeline.generate(PICTURES, PROMPTS, max_new_tokens=2)
    assert [list(row.token_ids) for row in rows] == [list(case.bundle_ids) for case in report.cases]
    _spoil(checkpoint)
    spoiled = {stage.name: stage for stage in check_parity(bundle, checkpoint, **options).stages}
    assert any("quantisation steps apart" in str(finding) for finding in spoiled["first_logits"].findings)


def _spoil(checkpoint: Path) -> None:
    """One weight of the language model's first layer."""
    state = load_file(checkpoint / "model.safetensors")
    ends = ("layers.0.mlp.down_proj.weight", "transformer.h.0.mlp.c_proj.weight")
    name = next(name for name in state if name.endswith(ends) and "vision" not in name and "perceiver" not in name)
    state[name][1, 3] += 2.0
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
