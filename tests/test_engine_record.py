"""Whether an engine may be loaded on a machine, and the command that builds it there."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from bridgeport.engine_record import BuildOptions, EngineProfile, EngineRecord, ShapeRange, check_engine
from tests.export.tensorrt.bundles import MACHINE


def make_record(**options: Any) -> EngineRecord:
    shapes: dict[str, ShapeRange] = {"x": ((1, 3), (2, 3), (4, 3))}
    return EngineRecord(
        file="encoder/model.plan",
        machine=MACHINE,
        profiles=(EngineProfile(name="default", axes={"batch": (1, 2, 4)}, shapes=shapes),),
        precision="fp16",
        sources={"encoder/model.onnx": "0" * 64},
        flags=(),
        options=BuildOptions(**options),
        requested=("--profile", "batch=1,2,4", "--strip"),
        bridgeport_version="0.1.0",
    )


def test_the_machine_of_the_build_is_taken() -> None:
    assert check_engine(make_record(), MACHINE) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tensorrt": "10.3.0.31"}, "TensorRT"),
        ({"compute_capability": "8.9"}, "GPU"),
        ({"gpu": "Orin Next"}, "GPU"),
        ({"platform": "linux-x86_64"}, "platform"),
        ({"cuda": "12.2"}, "CUDA"),
        ({"driver": "540.3.0"}, "driver"),
        ({"l4t": "36.4"}, "Jetson Linux"),
        ({"l4t": None}, "Jetson Linux"),
    ],
)
def test_what_does_not_match_is_refused_with_the_command(change: dict[str, Any], what: str) -> None:
    (mismatch,) = check_engine(make_record(), MACHINE.model_copy(update=change), "b")
    assert mismatch.what == what
    assert "rebuild it here: bridgeport build b -o NEW --profile batch=1,2,4 --strip" in mismatch.as_text()


@pytest.mark.parametrize("change", [{"cuda": "13.0"}, {"driver": "580.1"}, {"l4t": "36.5.0"}, {"driver": None}])
def test_newer_software_around_it_is_taken(change: dict[str, Any]) -> None:
    assert check_engine(make_record(), MACHINE.model_copy(update=change)) == []


def test_version_compatible_engines_go_forward_only() -> None:
    record = make_record(version_compatible=True)
    assert check_engine(record, MACHINE.model_copy(update={"tensorrt": "11.4.0.106"})) == []
    assert len(check_engine(record, MACHINE.model_copy(update={"tensorrt": "10.2.0"}))) == 1


def test_hardware_compatibility() -> None:
    same, ampere = (make_record(hardware_compatibility=name) for name in ("SAME_COMPUTE_CAPABILITY", "AMPERE_PLUS"))
    other_model, other_sm = ({"gpu": "X"}, {"gpu": "X", "compute_capability": "8.9"})
    old = {"gpu": "X", "compute_capability": "7.5"}
    found = [
        len(check_engine(record, MACHINE.model_copy(update=change)))
        for record in (same, ampere)
        for change in (other_model, other_sm, old)
    ]
    assert found == [0, 1, 1, 0, 0, 1]


def test_a_shape_outside_of_a_profile_says_which_axis() -> None:
    (profile,) = make_record().profiles
    assert profile.holds({"x": (3, 3)}) is None
    assert profile.holds({"x": (5, 3)}) == "axis 0 of x is 5, the profile 'default' takes 1 to 4"
    assert profile.holds({"x": (3,)}) == "x is [3], the profile has 2 axes"


def test_options_are_written_as_words_and_flags_by_name() -> None:
    options = BuildOptions(strip=True, weight_streaming=True, workspace_mib=512)
    assert options.arguments() == ["--workspace", "512", "--strip", "--weight-streaming"]
    assert options.flags() == ("STRIP_PLAN", "REFIT_IDENTICAL", "WEIGHT_STREAMING")


def test_a_record_comes_back_from_json() -> None:
    record = make_record(strip=True)
    assert EngineRecord.model_validate_json(record.model_dump_json()) == record
    with pytest.raises(ValidationError):
        EngineRecord.model_validate({**record.model_dump(), "fp16": True})
