"""Axes against the contract, corners of the profiles, and stages run at them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tests.export.preflight.stages import LARGEST, NoCache, contract, manifest, record, write_graph

from bridgeport.bundle import Bundle
from bridgeport.errors import InputError
from bridgeport.export.preflight.corners import CornerResult, Limits, StageRunner, corner_findings
from bridgeport.export.preflight.feeds import Feed, make_feed
from bridgeport.export.preflight.profiles import MOST_CORNERS, Corner, _settings, check_axes, stage_corners
from bridgeport.export.tensorrt.profiles import parse_profiles, stage_profiles
from bridgeport.models.contract import Axis, StageContract, TensorSpec

DOUBLE = "two = Constant<value_float = 2.0>() y = Mul(x, two)"
# 0 / (8 - batch): NaN at the largest batch, 0 at all others.
NAN_AT_LARGEST = """shape = Shape<start = 0, end = 1>(x) eight = Constant<value_ints = [8]>() left = Sub(eight, shape)
    divisor = Cast<to = 1>(left) zero = Constant<value_float = 0.0>() none = Div(zero, divisor) y = Add(x, none)"""
MEAN_OF_ROWS = "axes = Constant<value_ints = [0]>() m = ReduceMean<keepdims = 1>(x, axes) y = Add(x, m)"
BAKED = "shape = Constant<value_ints = [2, 4]>() y = Reshape(x, shape)"
ONE_ROW = "axes = Constant<value_ints = [0]>() y = ReduceMax<keepdims = 1>(x, axes)"
ROOMY = Limits(memory=1 << 30)


def corners_of(body: str, path: Path, **options: Any) -> list[CornerResult]:
    """The stage `body`, run at batch 1, 2 and 8."""
    graph = write_graph(path, body)
    limits = options.pop("limits", ROOMY)
    stage = options.pop("stage", record())
    peak = options.pop("peak", 1000)
    runner = StageRunner(stage, manifest(), graph, limits, peak, options.pop("weights", 0), threads=1, **options)
    return runner.run(stage_corners(stage, manifest()))


def test_a_sound_stage_passes_at_every_corner(tmp_path: Path) -> None:
    results = corners_of(DOUBLE, tmp_path)
    assert [one.sizes["batch"] for one in results] == [1, 2, LARGEST]
    assert [one.status for one in results] == ["passed"] * 3
    assert [one.batched for one in results] == [None, 0.0, 0.0]
    assert not list(corner_findings(results))


@pytest.mark.parametrize(
    ("body", "batch", "word"),
    [
        (NAN_AT_LARGEST, [LARGEST], "y holds nan at [0, 0]"),
        (MEAN_OF_ROWS, [2, LARGEST], "the same row alone"),
        (BAKED, [1, LARGEST], "does not run"),
        (ONE_ROW, [2, LARGEST], "a size was baked in"),
    ],
    ids=["NaN at a corner", "rows mixed", "reshape baked", "batch lost"],
)
def test_planted_faults_are_found_at_their_corners(tmp_path: Path, body: str, batch: list[int], word: str) -> None:
    results = corners_of(body, tmp_path)
    failed = [one for one in results if one.status == "failed"]
    # A row alone cannot run where batch 1 is what fails, so batch 2 of the baked graph fails with it.
    assert set(batch) <= {one.sizes["batch"] for one in failed}
    assert all(word in one.note for one in failed), [one.note for one in failed]
    findings = list(corner_findings(results))
    assert {one.severity for one in findings} == {"error"}
    assert f"batch={batch[-1]}" in {one.node for one in findings}


def test_a_reference_that_differs_is_told(tmp_path: Path) -> None:
    def twice(stage: str, feed: Feed, sizes: Mapping[str, int]) -> Feed:
        return {"y": feed["x"] * 2 + (sizes["batch"] == LARGEST) * np.float32(0.01)}

    results = corners_of(DOUBLE, tmp_path, reference=twice)
    assert [one.status for one in results] == ["passed", "passed", "failed"]
    assert results[0].reference == 0.0
    assert "PyTorch" in results[-1].note


def test_what_memory_does_not_allow_is_skipped_and_a_smaller_batch_is_run(tmp_path: Path) -> None:
    # 8 rows take 12000 bytes with ONNX Runtime's share, 4 rows 6000.
    results = corners_of(DOUBLE, tmp_path, limits=Limits(memory=7000), peak=8000)
    assert [(one.sizes["batch"], one.status, one.reduced) for one in results] == [
        (1, "passed", False),
        (2, "passed", False),
        (LARGEST, "skipped", False),
        (4, "passed", True),
    ]
    (finding,) = corner_findings(results)
    assert finding.severity == "warning"
    assert finding.node == "batch=8"
    assert "1 of 3 corners" in finding.why
    assert "batch=4 was run and passed" in finding.why


def test_weights_beyond_the_memory_and_no_time_left(tmp_path: Path) -> None:
    heavy = corners_of(DOUBLE, tmp_path, limits=Limits(memory=1000), weights=2000, peak=0)
    assert {one.status for one in heavy} == {"skipped"}
    assert "weights" in heavy[0].note
    hurried = corners_of(DOUBLE, tmp_path, limits=Limits(memory=1 << 30, seconds=0.0))
    assert [one.status for one in hurried[:2]] == ["passed", "skipped"]
    assert "s of the limit" in hurried[1].note


def test_a_graph_that_does_not_load(tmp_path: Path) -> None:
    (result,) = corners_of("y = NoSuchOperator(x)", tmp_path)
    assert result.status == "failed"
    assert "does not load" in result.note


AXES = {
    "clean": ("batch, 4", "", contract(), {}),
    "baked": ("2, 4", "", contract(), {"x": "error"}),
    "other rank": ("batch, 4, 1", "", contract(), {"x": "error"}),
    "uncovered": ("batch, 4", ", float[N] z", contract(), {"z": "error"}),
    "dynamic beyond the contract": ("batch, W", "", contract(), {"x": "note"}),
    "wide": ("batch, 4", "", contract(best=1, high=65), {"batch": "note"}),
}


@pytest.mark.parametrize(("shape", "more", "of", "expected"), AXES.values(), ids=AXES)
def test_axes_of_graph_and_contract(
    tmp_path: Path, shape: str, more: str, of: StageContract, expected: dict[str, str]
) -> None:
    graph = write_graph(tmp_path, "y = Identity(x)", x=shape, y=shape, more=more)
    found = {one.node: one.severity for one in check_axes(record(of), manifest(), ir.load(graph))}
    assert found == expected


def test_a_range_out_of_order(tmp_path: Path) -> None:
    """The contract's own check can be got round, say by `model_copy`."""
    axis = Axis.model_construct(name="batch", min=4, opt=2, max=8, patches=None)
    of = contract().model_copy(update={"axes": (axis,)})
    (found,) = check_axes(
        record().model_copy(update={"contract": of}), manifest(), ir.load(write_graph(tmp_path, DOUBLE))
    )
    assert (found.severity, found.node) == ("error", "batch")
    assert "4, 2, 8" in found.why


def test_few_axes_are_combined_and_many_are_taken_one_at_a_time() -> None:
    three = dict.fromkeys("abc", (1, 2, 3))
    assert len(list(_settings(three))) == MOST_CORNERS
    five = dict.fromkeys("abcde", (1, 2, 3))
    found = {tuple(one.values()) for one in _settings(five)}
    assert len(found) <= MOST_CORNERS
    assert {(1,) * 5, (2,) * 5, (3,) * 5, (2, 2, 3, 2, 2), (1, 2, 2, 2, 2)} <= found


def test_corners_of_a_decoder_keep_its_axes_together(blip2_bundle: Any) -> None:
    bundle = Bundle.load(blip2_bundle("llama"))
    llm = bundle.manifest.stage("llm")
    cache = bundle.manifest.kv_cache
    assert cache is not None
    apart = bundle.manifest.model_copy(update={"kv_cache": cache.model_copy(update={"shared_buffer": False})})
    longest = llm.contract.axis("total_sequence").max
    for manifest_ in (bundle.manifest, apart):
        corners = stage_corners(llm, manifest_)
        sizes = [one.sizes for one in corners]
        assert all(one["total_sequence"] == one["past_sequence"] + one["sequence"] for one in sizes)
        assert {one.profile for one in corners} == {"prefill", "decode"}
        assert all(one.sizes["past_sequence"] == 0 for one in corners if one.profile == "prefill")
        assert {longest} <= {one["total_sequence"] for one in sizes}
        assert {llm.contract.axis("batch").min, llm.contract.axis("batch").max} == {one["batch"] for one in sizes}


def test_latents_follow_the_pictures() -> None:
    """Flamingo: `image_sequence` is so many times the latents as there are `images`, at every corner and bound."""
    ranges = {"batch": (1, 1, 2), "images": (1, 1, 8), "image_sequence": (4, 4, 32), "sequence": (1, 4, 16)}
    of = StageContract(
        name="llm",
        inputs=tuple(TensorSpec(name=f"x_{axis}", dtype="float32", shape=(axis,)) for axis in ranges),
        outputs=(),
        axes=tuple(Axis(name=axis, min=low, opt=best, max=high) for axis, (low, best, high) in ranges.items()),
    )
    pictures: Any = type("Pictures", (NoCache,), {"flamingo": type("", (), {"latents": 4})})()
    for texts in ([], ["images=1,2,3"], ["images=1,2,3 image_sequence=4,8,12"]):
        corners = stage_corners(record(of), pictures, texts)
        assert {one.sizes["image_sequence"] / one.sizes["images"] for one in corners} == {4}
        assert max(one.sizes["images"] for one in corners) == (3 if texts else 8)
        (profile,) = stage_profiles(record(of), pictures, parse_profiles(texts))
        assert profile.axes["image_sequence"] == tuple(4 * size for size in profile.axes["images"])
    with pytest.raises(InputError, match="image_sequence of stage llm is 4 for each picture, 4,8,12 here; name images"):
        stage_corners(record(of), pictures, ["images=1,2,3 image_sequence=4,4,12"])


def test_a_profile_narrows_the_corners_and_stays_in_the_contract() -> None:
    assert [one.sizes["batch"] for one in stage_corners(record(), manifest(), ["batch=2,3,4"])] == [2, 3, 4]
    with pytest.raises(InputError, match="batch=1,2,9 is outside"):
        stage_corners(record(), manifest(), ["batch=1,2,9"])


def test_feeds_mask_the_last_row_of_a_prefill_and_point_at_its_last_token(blip2_bundle: Any) -> None:
    contract_ = Bundle.load(blip2_bundle("llama")).manifest.stage("llm").contract
    sizes = {"batch": 3, "sequence": 8, "total_sequence": 8, "past_sequence": 0}
    feed = make_feed(contract_.inputs, sizes)
    assert feed["attention_mask"].sum(1).tolist() == [8, 8, 6]
    assert feed["logits_position"].tolist() == [7, 7, 5]
    assert Corner("prefill", sizes).label() == "batch=3 sequence=8 total_sequence=8 past_sequence=0"
