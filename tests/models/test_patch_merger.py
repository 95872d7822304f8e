"""Patch mergers against Qwen2-VL's and Qwen2.5-VL's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tests.models.connectors import CAUGHT, assert_equal, connector_contract, copy_weights, export, prepare
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger as Qwen2VLPatchMerger

from bridgeport.models.patch_merger import PatchMerger

Norm = Literal["layer", "rms"]
REFERENCES: dict[Norm, Any] = {"layer": Qwen2VLPatchMerger, "rms": Qwen2_5_VLPatchMerger}


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("width", "output_width", "merge_size"), [(16, 24, 2), (9, 31, 3), (20, 8, 1)])
@torch.no_grad()
def test_equals_transformers(norm: Norm, width: int, output_width: int, merge_size: int) -> None:
    theirs = prepare(REFERENCES[norm](output_width, width, merge_size), width)
    ours = PatchMerger(width, output_width, merge_size=merge_size, norm=norm)
    copy_weights(theirs, ours)
    patches = 3 * torch.randn(5 * merge_size**2, width, generator=torch.Generator().manual_seed(1)) + 1
    want = theirs(patches)
    assert_equal(ours(patches.reshape(5, -1, width)), want)
    assert_equal(ours(patches), want)
    other = PatchMerger(width, output_width, merge_size=merge_size, norm="rms" if norm == "layer" else "layer")
    other.load_state_dict(ours.state_dict(), strict=False)
    assert (other(patches) - want).abs().max() > CAUGHT


@pytest.mark.parametrize("norm", [pytest.param("layer", marks=pytest.mark.slow), "rms"])
def test_exports_with_tokens_dynamic(norm: Norm, tmp_path: Path) -> None:
    contract = connector_contract({"image_embeds": ("tokens", 4, 12)}, ("tokens", 10))
    operators = export(prepare(PatchMerger(12, 10, norm=norm), 1), contract, tmp_path)
    assert operators.get("LayerNormalization", 0) == (norm == "layer")
