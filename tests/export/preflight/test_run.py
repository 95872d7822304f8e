"""Preflight of whole bundles: a clean one, planted problems, the report as JSON, and the verb."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from tests.export.preflight.stages import edited, planted, without_decoder, write_graph

from bridgeport import cli
from bridgeport.bundle import Bundle
from bridgeport.errors import InputError
from bridgeport.export.preflight.corners import Limits
from bridgeport.export.preflight.devices import Device
from bridgeport.export.preflight.report import PreflightReport
from bridgeport.export.preflight.run import preflight

ROOMY = Limits(memory=4 << 30, seconds=600.0)
SMALL = "batch=1,2,4 sequence=1,4,8"


def check(bundle: Path, **options: Any) -> PreflightReport:
    """Preflight with small profiles."""
    return preflight(bundle, **{"profiles": [SMALL], "limits": ROOMY, "threads": 1, **options})


def findings(report: PreflightReport, severity: str) -> set[tuple[str, str]]:
    """(stage, check) of this severity."""
    return {(one.stage, one.check) for one in report.findings if one.severity == severity}


@pytest.fixture(scope="module")
def vision(blip2_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without its decoder, which is the one stage that TensorRT does not read as it is exported."""
    return without_decoder(blip2_bundle("llama"), tmp_path_factory.mktemp("vision") / "bundle")


@pytest.fixture(scope="module")
def clean(vision: Path) -> PreflightReport:
    """Of the bundle of `vision`, on an L4."""
    return check(vision, device="l4")


def test_a_clean_bundle_is_clean(clean: PreflightReport) -> None:
    assert clean.passed
    assert findings(clean, "error") == findings(clean, "warning") == set()
    # 3 batches for encoder and connector, 3 batches with 3 lengths for the embedding.
    assert [one.status for one in clean.corners] == ["passed"] * (3 + 3 + 9)
    assert {one.batched is None for one in clean.corners if one.sizes["batch"] == 1} == {True}


def test_the_report_is_json(clean: PreflightReport) -> None:
    document = json.loads(json.dumps(clean.to_json(), allow_nan=False))
    assert set(document) == {
        "schema_version",
        "bundle",
        "tensorrt",
        "device",
        "passed",
        "counts",
        "findings",
        "corners",
        "memory",
    }
    assert (document["passed"], document["tensorrt"], document["device"]) == (True, "10.3", "l4")
    assert set(document["counts"]) == {"error", "warning", "note"}
    assert set(document["corners"][0]) >= {"stage", "profile", "sizes", "status", "batched", "reference", "note"}
    stages = {one["stage"]: one for one in document["memory"]["stages"]}
    assert list(stages) == ["encoder", "connector", "embed_tokens"]
    assert stages["encoder"]["weights_total"] == sum(stages["encoder"]["weights"].values()) > 0
    assert document["memory"]["run_max"] >= document["memory"]["run_opt"] > 0
    assert "never measured" in document["memory"]["method"]


def test_a_decoder_of_onnx_runtime_is_found_and_can_be_fixed(blip2_bundle: Callable[[str], Path]) -> None:
    report = check(blip2_bundle("llama"))
    errors = [one for one in report.findings if one.severity == "error"]
    assert {one.stage for one in errors} == {"llm"}
    assert {"contrib", "opset"} <= {one.check for one in errors}
    assert all(one.fixable for one in errors)
    assert {one.status for one in report.corners} == {"passed"}


def test_corners_are_held_against_pytorch(
    blip2_bundle: Callable[[str], Path], blip2_checkpoint: Callable[[str], Path]
) -> None:
    report = check(blip2_bundle("llama"), reference=blip2_checkpoint("llama"))
    compared = {one.stage for one in report.corners if one.reference is not None}
    assert compared == {"encoder", "connector", "embed_tokens", "llm"}
    assert max(one.reference or 0.0 for one in report.corners) < 1e-4
    other = check(blip2_bundle("llama"), reference=blip2_checkpoint("llama-gqa-tied"))
    assert ("encoder", "corner") in findings(other, "error"), "another checkpoint's weights must be told"
    assert ("bundle", "reference") in findings(other, "warning")
    assert ("bundle", "reference") not in findings(report, "warning")


def _bake(model: ir.Model) -> None:
    """The batch of the input fixed at 2."""
    value = model.graph.inputs[0]
    assert value.shape is not None
    value.shape = ir.Shape([2, *value.shape[1:]])


def _nan(model: ir.Model) -> None:
    """One NaN in a bias."""
    value = next(one for one in model.graph.initializers.values() if one.name and one.name.endswith("bias"))
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[0] = math.nan
    value.const_value = ir.tensor(array, name=value.name)


def _uncovered(model: ir.Model) -> None:
    """Another input, with an axis of its own."""
    model.graph.inputs.append(ir.Value(name="scale", shape=ir.Shape(["N"]), type=ir.TensorType(ir.DataType.FLOAT)))


PLANTS: dict[str, tuple[Callable[[ir.Model], None], set[str]]] = {
    "baked": (_bake, {"profile", "corner"}),
    "nan": (_nan, {"constant", "corner"}),
    "uncovered": (_uncovered, {"profile", "corner"}),
}


@pytest.mark.parametrize(("edit", "expected"), PLANTS.values(), ids=PLANTS)
def test_planted_problems_are_found(
    vision: Path, tmp_path: Path, edit: Callable[[ir.Model], None], expected: set[str]
) -> None:
    report = check(planted(vision, tmp_path / "bundle", "connector", edit))
    assert findings(report, "error") == {("connector", one) for one in expected}
    assert not report.passed


def test_too_little_memory_on_a_device_of_ones_own(vision: Path) -> None:
    tiny = Device(
        "tiny", "Tiny", "discrete", "8.9", memory_gib=0.0001, unified=False, reserved_mib=0, dla_cores=0, source=""
    )
    assert ("bundle", "memory") in findings(check(vision, device=tiny), "error")


def test_a_precision_that_the_device_lacks(vision: Path, tmp_path: Path) -> None:
    def name_fp8(document: dict[str, Any]) -> None:
        document["stages"][0]["precision"] = "fp8"

    bundle = edited(vision, tmp_path / "bundle", name_fp8)
    assert ("encoder", "device-precision") in findings(check(bundle, device="agx-orin"), "error")
    assert ("encoder", "device-precision") not in findings(check(bundle, device="l4"), "error")


@pytest.mark.parametrize("version", ["9.0", "10.17", "11.9", "12.0"])
def test_an_unknown_version_lists_the_known(vision: Path, version: str) -> None:
    with pytest.raises(InputError, match=r"accepted are 10\.3, 10\.13, 10\.16, 11\.4"):
        preflight(Bundle.load(vision), tensorrt=version)


def verb(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit status of `bridgeport preflight`."""
    monkeypatch.setitem(cli.VERBS, "preflight", "bridgeport.export.cli.preflight")
    return cli.main(["preflight", *map(str, words)])


OPTIONS = ("--threads", 1, "--profile", SMALL)


def test_exit_status_and_what_is_printed(
    vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb(monkeypatch, vision, "--json", *OPTIONS) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    broken = planted(vision, tmp_path / "bundle", "connector", _bake)
    assert verb(monkeypatch, broken, *OPTIONS) == 1
    printed = capsys.readouterr()
    assert "baked" in " ".join(printed.out.split())
    assert re.search(r"for TensorRT 10\.3: \d errors", printed.err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tensorrt", "8.6"), "accepted are 10.3, 10.13"),
        (("--tensorrt", "ten"), "write it as 10.3"),
        (("--device", "orin"), "accepted are orin-nano-4gb"),
        (("--fix",), "--fix and -o OUT go together"),
        (("--profile", "batch=1,4,99"), "outside of what stage"),
        (("--profile", "frames=1"), "no stage has the axis"),
        (("--reference", "/nowhere"), "/nowhere"),
    ],
)
def test_bad_usage(
    vision: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    assert verb(monkeypatch, vision, *words) == 2
    assert message in capsys.readouterr().err


def test_one_graph_of_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An .onnx file has no contract: its nodes are checked, and nothing is run or repaired."""
    graph = write_graph(tmp_path, "y = Erf(x)")
    assert verb(monkeypatch, graph, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["findings"], document["corners"], document["memory"]) == ([], [], None)
    write_graph(tmp_path, "y = com.microsoft.Gelu(x)")
    assert verb(monkeypatch, graph, "--device", "orin-nano") == 1
    printed = capsys.readouterr()
    assert "com.microsoft.Gelu" in "".join(printed.out.split())
    assert "(--fix does it)" not in printed.out
    assert verb(monkeypatch, graph, "--fix", "-o", tmp_path / "out", "--profile", "batch=1") == 2
    assert "leave --fix, -o, --profile out, or give the bundle" in capsys.readouterr().err
    graph.write_bytes(b"no model")
    assert verb(monkeypatch, graph) == 2
    assert "model.onnx is not read as an ONNX model" in capsys.readouterr().err


def test_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(monkeypatch, tmp_path / "none") == 2
    assert "does not exist" in capsys.readouterr().err
