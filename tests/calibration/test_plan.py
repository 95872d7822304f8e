"""Which precision each stage gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridgeport.bundle import read_manifest
from bridgeport.calibration.plan import parse_overrides, plan_stages
from bridgeport.errors import InputError
from bridgeport.export.options import PRECISIONS, TARGETS
from bridgeport.manifest import Manifest


@pytest.fixture
def manifest(small_bundle: Path) -> Manifest:
    return read_manifest(small_bundle)


@pytest.mark.parametrize(
    ("precision", "target", "planned"),
    [
        ("fp16", "cuda", "fp16 fp16 fp16 fp16"),
        ("int8", "cpu", "int8 int8 fp32 int8"),
        ("int8", "tensorrt", "int8 int8 fp16 int8"),
        ("int4", "cpu", "fp32 fp32 fp32 int4"),
        ("int4", "cuda", "fp16 fp16 fp16 int4"),
        ("fp8", "tensorrt", "fp8 fp8 fp16 fp16"),
        ("fp32", "tensorrt", "fp32 fp32 fp32 fp32"),
    ],
)
def test_each_precision_reaches_the_stages_that_it_is_for(
    manifest: Manifest, precision: str, target: str, planned: str
) -> None:
    names = ("encoder", "connector", "embed_tokens", "llm")
    assert plan_stages(manifest, precision, target) == dict(zip(names, planned.split(), strict=True))


def test_a_stage_has_a_precision_of_its_own(manifest: Manifest) -> None:
    plan = plan_stages(manifest, "int8", "cpu", parse_overrides(["llm=int4", "connector=fp32"]))
    assert plan == {"encoder": "int8", "connector": "fp32", "embed_tokens": "fp32", "llm": "int4"}


@pytest.mark.parametrize("text", ["llm", "=int8", "llm=", ""])
def test_an_override_without_both_sides_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not STAGE=PRECISION; write for example"):
        parse_overrides([text])


@pytest.mark.parametrize(
    ("precision", "target", "overrides", "message"),
    [
        ("int3", "cpu", {}, "precision 'int3' is unknown; accepted are fp32, fp16, fp8, int8, int4"),
        ("int8", "tpu", {}, "target 'tpu' is unknown; accepted are cpu, cuda, tensorrt"),
        ("fp8", "cpu", {}, "precision fp8 cannot run on target cpu, which takes fp32, fp16, int8, int4; choose"),
        ("fp8", "cuda", {}, "precision fp8 cannot run on target cuda"),
        ("int8", "cpu", {"vision": "fp32"}, "stage 'vision' is unknown; this bundle has encoder, connector"),
        ("int8", "cpu", {"encoder": "int2"}, "precision 'int2' is unknown"),
        ("int8", "cpu", {"encoder": "fp8"}, "precision fp8 cannot run on target cpu"),
        ("int8", "cpu", {"embed_tokens": "int8"}, "a table of embeddings takes fp32 or fp16"),
        ("int8", "tensorrt", {"llm": "fp8"}, "a language model takes fp32, fp16, int8 or int4"),
        ("int8", "cpu", {"encoder": "int4"}, "4-bit weights are for language models; take fp16 or int8 here"),
    ],
)
def test_what_no_target_does_is_refused(
    manifest: Manifest, precision: str, target: str, overrides: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan_stages(manifest, precision, target, overrides)


def test_every_precision_has_a_target_that_runs_it(manifest: Manifest) -> None:
    done = set()
    for precision in PRECISIONS:
        for target in TARGETS:
            try:
                plan = plan_stages(manifest, precision, target)
            except InputError:
                continue
            done.add(precision)
            assert precision in plan.values()
    assert done == set(PRECISIONS)


def test_a_bundle_that_was_built_is_told_so(manifest: Manifest) -> None:
    """`build` makes the target tensorrt, which says nothing about quantisation."""
    stages = tuple(stage.model_copy(update={"format": "tensorrt"}) for stage in manifest.stages)
    built = manifest.model_copy(update={"target": "tensorrt", "stages": stages})
    with pytest.raises(InputError, match=r"holds TensorRT engines \(encoder, .*, llm\).*quantise the FP32 bundle that"):
        plan_stages(built, "int8", "tensorrt")


def test_a_stage_that_was_rounded_at_export_is_kept_or_refused(manifest: Manifest) -> None:
    def record(stage: Any) -> Any:
        return stage.model_copy(update={"precision": "int4"}) if stage.contract.name == "llm" else stage

    rounded = manifest.model_copy(update={"stages": tuple(record(stage) for stage in manifest.stages)})
    with pytest.raises(
        InputError, match=r"stage llm is int4 already and int8 is wanted; .*keep it with --stage llm=int4"
    ):
        plan_stages(rounded, "int8", "cpu")
    assert plan_stages(rounded, "int8", "cpu", {"llm": "int4"})["llm"] == "int4"
    with pytest.raises(InputError, match=r"was quantised already .*rounding twice loses twice"):
        plan_stages(manifest.model_copy(update={"target": "tensorrt"}), "int8", "cpu")


def test_a_stage_that_is_named_twice_is_refused() -> None:
    assert parse_overrides(["llm=int4", "connector=fp16"]) == {"llm": "int4", "connector": "fp16"}
    with pytest.raises(InputError, match=r"--stage names connector twice \(int8 and fp16\); give every stage one"):
        parse_overrides(["connector=int8", "llm=int4", "connector=fp16"])
