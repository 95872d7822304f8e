"""`bridgeport export`: what goes to stdout, what to stderr, and the exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from tests.checkpoints import write_blip2_checkpoint

from bridgeport.cli import main
from bridgeport.export import options


def test_json_is_alone_on_stdout_and_stderr_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_blip2_checkpoint(tmp_path / "checkpoint", vision_layers=1, qformer_layers=1, num_layers=1)
    capfd.readouterr()
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "bundle"), "--json"]) == 0
    out, err = capfd.readouterr()
    summary = json.loads(out)
    assert [stage["name"] for stage in summary["stages"]] == ["encoder", "connector", "embed_tokens", "llm"]
    assert summary["checks"]["stages"]["encoder"]["onnxruntime"]["max_abs"] < 1e-4
    # No progress where there is no terminal, and nothing of what exporters print or log.
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "-o", "bundle"], "nowhere does not exist; a checkpoint is a local directory"),
        (["nowhere", "-o", "bundle", "--precision", "int9"], "precision 'int9' is unknown; accepted are fp32, fp16"),
        (["nowhere", "-o", "bundle", "--target", "tpu"], "target 'tpu' is unknown; accepted are cpu, cuda, tensorrt"),
        (
            ["nowhere", "-o", "bundle", "--precision", "int8"],
            "precision int8 for cpu needs pictures to calibrate and to judge with; add --calibration DIR",
        ),
        (
            ["nowhere", "-o", "bundle", "--target", "tensorrt"],
            "precision fp32 for tensorrt needs pictures to calibrate and to judge with; add --calibration DIR",
        ),
        (
            ["nowhere", "-o", "bundle", "--calibration", "pictures"],
            "precision fp32 for cpu needs no calibration data; leave --calibration pictures out",
        ),
        (["nowhere"], "Missing option"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named_before_anything_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "LIBRARIES", (*options.LIBRARIES, "no-such-library"))
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "bundle")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "exporting needs no-such-library, not installed here; run `pip install 'bridgeport[export,cpu]'`" in line


def test_options_are_answered_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from bridgeport.cli import main; "
        "status = main(['export', 'x', '-o', 'y', '--precision', 'int8']); "
        "sys.exit(status + 10 * ('torch' in sys.modules or 'onnx_ir' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr


@pytest.mark.slow
def test_export_goes_straight_to_a_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through the FP32 bundle, of which nothing is left, with the checks of both."""
    from bridgeport.calibration import GateLimits, quantize
    from bridgeport.calibration.task import write_small_data
    from bridgeport.models.small import checkpoint_path
    from bridgeport.runtime import Pipeline

    monkeypatch.setenv("BRIDGEPORT_CACHE", str(tmp_path / "cache"))
    # A timing on a machine that runs other tests says nothing.
    monkeypatch.setattr(quantize, "GateLimits", partial(GateLimits, max_slowdown=1000.0))
    data = write_small_data(tmp_path / "data", 12, held_out=True)
    out = tmp_path / "made" / "bundle"
    command = ["export", str(checkpoint_path()), "-o", str(out), "--precision", "int8", "--calibration", str(data)]
    status = main([*command, "--json"])
    printed, err = capfd.readouterr()
    assert status == 0, err
    assert [stage["precision"] for stage in json.loads(printed)["stages"]] == ["int8", "int8", "fp32", "int8"]
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    with Pipeline.load(out) as pipeline:
        assert set(pipeline.manifest.checks) >= {"export", "gate"}
        assert pipeline.generate(next(data.glob("*.png"))).text
