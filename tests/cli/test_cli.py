"""The command line as a whole: exit statuses, one line on stderr, --json alone on stdout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.export.tensorrt.libcuda import compile_libcuda

from bridgeport import __version__
from bridgeport.cli import VERBS, main


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert "Usage: bridgeport " + verb in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["exprot"], "No such command 'exprot'"),
        (["inspect"], "Missing argument 'bundle'"),
        (["inspect", "/nowhere/at/all"], "/nowhere/at/all does not exist; a bundle is a directory"),
        (["inspect", "--colour", "x"], "No such option: --colour"),
        (["bench", "x", "--rounds", "0"], "--rounds"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "/nowhere/at/all", "--debug"]) == 2
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert captured.err.splitlines()[-1].startswith("bridgeport: ")


def test_an_unexpected_error_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("a fault\nof two lines")

    monkeypatch.setattr("bridgeport.runtime.cli.doctor.examine", broken)
    assert main(["doctor"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("bridgeport: unexpected RuntimeError: a fault of two lines")
    assert len(captured.err.splitlines()) == 1


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bridgeport.runtime.cli.doctor.examine", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.strip() == "bridgeport: stopped before the end; nothing was written"


def test_doctor_json_names_this_machine_and_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["cores"] >= 1
    assert report["abilities"]["run bundles (CPU)"] == {"works": True, "missing": []}
    assert "CPUExecutionProvider" in report["providers"]


def test_doctor_names_the_gpu_and_what_it_is_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from bridgeport.runtime.cli import doctor
    from bridgeport.runtime.tensorrt import machine

    version, find = doctor._version, machine.find_machine
    library = compile_libcuda(tmp_path)
    monkeypatch.setattr(machine, "find_machine", lambda *words, **more: find(*words, library=library, **more))
    installed = {"tensorrt": "11.4.0.106", "cuda-bindings": "13.5.0"}
    monkeypatch.setattr(doctor, "_version", lambda name: installed.get(name) or version(name))
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"GPU: NVIDIA L4, SM 8\.9, 24\.0 GiB, driver \S+, CUDA 13\.0", shown)
    engines = "build and run TensorRT engines"
    assert doctor.examine()["abilities"][engines] == {"works": True, "missing": []}

    (tmp_path / "old").mkdir()
    too_old = compile_libcuda(tmp_path / "old", cuda=12040)
    monkeypatch.setattr(machine, "find_machine", lambda *words, **more: find(*words, library=too_old, **more))
    found = doctor.examine()
    assert found["abilities"][engines] == {"works": False, "missing": [], "why": found["gpu"]["why"]}
    assert "serves CUDA 12.4, TensorRT 11.4.0.106 needs CUDA 13" in found["gpu"]["why"]
    assert main(["doctor"]) == 0
    assert "GPU: none that can be used; the NVIDIA driver" in " ".join(capsys.readouterr().out.split())


def test_doctor_says_what_is_missing_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bridgeport.runtime.cli import doctor

    version = doctor._version
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "onnxscript" else version(name))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "missing: onnxscript" in " ".join(shown.split())
    assert doctor.examine()["abilities"]["export checkpoints"] == {"works": False, "missing": ["onnxscript"]}
