"""The command line as a whole: exit statuses, one line on stderr, --json alone on stdout."""

from __future__ import annotations

import json

import pytest

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
