"""Mixed precision from the command line, for targets other than ONNX Runtime: FP8, and INT8 in OpenVINO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from bridgeport.bundle import Bundle
from bridgeport.calibration.rules import check_rules
from bridgeport.calibration.task import write_small_data
from bridgeport.cli import main
from bridgeport.manifest import QuantizationRecord


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("auto-targets") / "data", 24)


def quantised(
    bundle: Path, data: Path, work: Path, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[Bundle, dict[str, Any]]:
    """What `quantize --auto` writes and prints; nothing on stderr, which is no terminal."""
    command = ["quantize", str(bundle), "-o", str(work / "out"), "--calibration", str(data), "--auto", "--json"]
    command += ["--cache", str(work / "cache"), "--report", str(work / "report"), "--task-drop", "100"]
    status = main([*command, "--max-slowdown", "1000", *words])
    out, err = capsys.readouterr()
    assert (status, err) == (0, ""), out + err
    return Bundle.load(work / "out"), json.loads(out)


def searched(bundle: Bundle, stage: str, work: Path) -> QuantizationRecord:
    """The stage's record, its search reported in the manifest and in files."""
    record = bundle.manifest.stage(stage).quantization
    assert record is not None
    assert record.details["auto"]["found"]
    assert 0 < record.details["auto"]["in_float"] < record.details["auto"]["layers"]
    assert any(why.startswith("sensitivity: cosine loss") for why in record.kept.values())
    names = {file.name for file in (work / "report" / stage).iterdir()}
    assert names == {"pareto.png", "pareto.csv", "sensitivity.csv"}
    return record


@pytest.mark.slow
def test_fp8_for_tensorrt(small_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain FP8 has 0.94 to 0.98 in the connector, by the pictures."""
    words = ("--precision", "fp8", "--target", "tensorrt", "--min-cosine", "0.985")
    made, gate = quantised(
        small_bundle, data, tmp_path, capsys, *words, "--stage", "encoder=fp16", "--stage", "llm=fp16"
    )
    record = searched(made, "connector", tmp_path)
    assert record.scheme == "qdq-fp8"
    assert record.details["auto"]["latency"].startswith("modelled, not measured")
    assert {one["stage"]: one["precision"] for one in gate["stages"]}["connector"] == "fp8"
    assert all(one["min_token_cosine"] >= 0.985 for one in gate["stages"])
    model = ir.load(made.graph("connector"))
    assert {node.inputs[2].dtype for node in model.graph if node.op_type == "QuantizeLinear" and node.inputs[2]} == {
        ir.DataType.FLOAT8E4M3FN
    }
    assert [one for one in check_rules(model, precision="fp8") if one.severity == "error"] == []


@pytest.mark.slow
def test_int8_in_openvino(small_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured: the worst token of plain INT8 is 0.9980 with attention in INT8 and 0.9985 without."""
    pytest.importorskip("openvino")
    words = ("--precision", "int8", "--engine", "openvino", "--min-cosine", "0.9987")
    made, gate = quantised(
        small_bundle, data, tmp_path, capsys, *words, "--stage", "connector=fp32", "--stage", "llm=fp32"
    )
    record = searched(made, "encoder", tmp_path)
    assert record.scheme.startswith("qdq-u8s8")
    assert record.details["speed_hint"]["engine"] == "openvino"
    assert record.details["auto"]["latency"].startswith("measured here by openvino")
    (verdict,) = gate["stages"]
    assert verdict["min_token_cosine"] >= 0.9987
    assert verdict["slowdown"] > 0
