"""`bridgeport quantize`: what is printed, where, and the exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bridgeport import speed_hint
from bridgeport.bundle import Bundle, read_manifest
from bridgeport.calibration import quantize as quantize_module
from bridgeport.calibration.task import write_small_data
from bridgeport.cli import main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("cli-quantize") / "data", 12, held_out=True)


@pytest.fixture(scope="module")
def int4(small_bundle: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An INT4 bundle and what the verb printed as JSON."""
    folder = tmp_path_factory.mktemp("cli-int4")
    command = ["quantize", str(small_bundle), "-o", str(folder / "out"), "--precision", "int4", "--json"]
    command += ["--calibration", str(data), "--cache", str(folder / "cache"), "--max-slowdown", "1000"]
    command += ["--save-inputs", str(folder / "inputs.npz")]
    done = subprocess.run([sys.executable, "-m", "bridgeport", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # No progress where there is no terminal.
    assert done.stderr == ""
    return folder / "out", json.loads(done.stdout)


def test_json_is_the_gate_of_the_manifest(int4: tuple[Path, dict[str, Any]]) -> None:
    out, document = int4
    assert document.pop("bundle") == str(out)
    assert document.pop("seconds") > 0
    assert document == read_manifest(out).checks["gate"]
    assert [one["stage"] for one in document["stages"]] == ["llm"]


def test_saved_inputs_are_tensors_for_that_bundle(int4: tuple[Path, dict[str, Any]], small_bundle: Path) -> None:
    from bridgeport.calibration.data import open_calibration

    data = open_calibration(int4[0].parent / "inputs.npz", bundle=Bundle.load(small_bundle))
    assert data.pictures == 12


def test_inspect_shows_how_the_stage_came_to_its_precision(
    int4: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(int4[0])]) == 0
    shown = capsys.readouterr().out
    assert "scheme nbits-4-rtn" in shown
    assert "gate: worst token's cosine 0." in shown
    assert "(least 0.4), " in shown
    assert "calibrated on 9 pictures, judged on 3 others (seed 0, data " in shown
    assert "(paired standard error " in shown


def test_a_bundle_for_another_processor_says_so(
    int4: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    held_out_picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A hint that names an instruction set which this machine lacks: `run` warns, and `inspect` too."""
    manifest = read_manifest(int4[0])
    hint = {"instruction_set": "amx-int8", "processor": "Another", "scheme": "nbits", "version": "1", "ratio": 3.0}
    stages = []
    for stage in manifest.stages:
        if stage.quantization is not None:
            record = stage.quantization.model_copy(
                update={"details": {"speed_hint": hint}, "kept": {f"node_{n}": "it reads pixels" for n in range(5)}}
            )
            stage = stage.model_copy(update={"quantization": record})
        stages.append(stage)
    copy = tmp_path / "copy"
    copy.symlink_to(int4[0])
    changed = Bundle(copy, manifest.model_copy(update={"stages": tuple(stages)}))
    monkeypatch.setattr(Bundle, "load", lambda _: changed)
    monkeypatch.setattr(speed_hint, "instruction_sets", lambda: ("avx2",))
    assert main(["run", str(copy), "--image", str(held_out_picture), "--max-new-tokens", "1"]) == 0
    warning = "llm: made for amx-int8 (Another), where nbits ran 3.0 x as fast as FP32"
    assert [record.message[: len(warning)] for record in caplog.records] == [warning]
    assert main(["inspect", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert "  warning: made for amx-int8 (Another)" in shown
    assert (
        "  5 kept finer: node_0 (it reads pixels), node_1 (it reads pixels), node_2 (it reads pixels), and 2 more"
        in shown
    )


def test_a_missed_gate_exits_1_with_the_table_before(
    small_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(small_bundle), "-o", str(tmp_path / "out"), "--precision", "int4"]
    command += ["--calibration", str(data), "--cache", str(tmp_path / "cache"), "--max-slowdown", "1000"]
    assert main([*command, "--min-cosine", "0.99999"]) == 1
    out, err = capsys.readouterr()
    assert "llm" in out
    assert "missed" in out
    assert re.search(r"^llm: /\S+/MatMul adds the largest error$", out, re.MULTILINE), out
    assert len(err.splitlines()) == 1
    assert err.splitlines()[-1].startswith("bridgeport: not written: llm: worst token's cosine 0.")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8"], "precision fp8 cannot run on target cpu"),
        (["--precision", "int8", "--stage", "llm"], "--stage 'llm' is not STAGE=PRECISION"),
        (
            ["--precision", "int8", "--stage", "llm=int8", "--stage", "llm=int4"],
            "--stage names llm twice (int8 and int4)",
        ),
        (["--precision", "int8", "--save-inputs", "inputs.txt"], "inputs.txt is no name for tensors"),
        (["--precision", "int8", "--report", "report"], "--report is what --auto found; add --auto, or leave"),
        (
            ["--precision", "int8", "--weights", "gptq"],
            "--weights gptq fits the 4-bit weights of a",
        ),
        (["--precision", "int8", "--observer", "median"], "--observer 'median' is unknown"),
        (["--precision", "int8", "--samples", "3"], "--samples"),
        (["--precision", "int8", "--min-cosine", "2"], "--min-cosine 2.0 is no cosine"),
        (["--precision", "int8", "--calibration", "nowhere"], "calibration data nowhere does not exist; accepted are"),
        ([], "Missing option '--precision'"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    small_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [] if "--calibration" in arguments else ["--calibration", "pictures"]
    assert main(["quantize", str(small_bundle), "-o", "out", *given, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(
    small_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_module, "judge", stop)
    command = ["quantize", str(small_bundle), "-o", str(tmp_path / "out"), "--precision", "int4"]
    assert main([*command, "--calibration", str(data)]) == 130
    assert not list(tmp_path.iterdir())
