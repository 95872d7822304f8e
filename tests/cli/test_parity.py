"""`bridgeport parity`: exit status, streams and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.runtime.test_parity_report import failing, make_report

from bridgeport.cli import main
from bridgeport.errors import CheckpointError
from bridgeport.models.small import checkpoint_path
from bridgeport.runtime import parity as package
from bridgeport.runtime.parity.report import ParityReport


class Calls:
    """Stands in for `check_parity`: keeps what it was called with and gives back `report`."""

    def __init__(self, report: ParityReport) -> None:
        self.report = report
        self.seen: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def __call__(self, *arguments: object, **options: object) -> ParityReport:
        self.seen.append((arguments, options))
        return self.report


def stand_in(monkeypatch: pytest.MonkeyPatch, report: ParityReport) -> Calls:
    calls = Calls(report)
    monkeypatch.setattr(package, "check_parity", calls)
    return calls


def test_passed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, make_report())
    assert main(["parity", "bundle", "--reference", "checkpoint"]) == 0
    assert "PASSED" in capsys.readouterr().out
    arguments, options = calls.seen[0]
    assert arguments == (Path("bundle"), Path("checkpoint"))
    assert options["images"] is None
    assert options["prompts"] is None
    assert options["drill"] is False


def test_failed_prints_the_report_first_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, failing())
    assert main(["parity", "bundle", "--reference", "checkpoint"]) == 1
    out, err = capsys.readouterr()
    assert "FAILED" in out
    assert err.strip().splitlines()[-1].startswith("bridgeport: parity failed: connector is the first stage to diverge")


def test_json_is_one_document_alone_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls = stand_in(monkeypatch, failing())
    html = tmp_path / "report.html"
    words = [
        "--image",
        "a.png",
        "--image",
        "b.png",
        "--prompt",
        "",
        "--prompt",
        "what?",
        "--drill",
        "--html",
        str(html),
    ]
    assert main(["parity", "bundle", "--reference", "checkpoint", "--json", *words]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["first_divergence"] == "connector"
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    options = calls.seen[0][1]
    assert options["images"] == [Path("a.png"), Path("b.png")]
    assert options["prompts"] == ["", "what?"]
    assert options["drill"] is True


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["parity", "no-bundle", "--reference", "no-checkpoint"], "no-bundle does not exist"),
        (["parity", "no-bundle"], "Missing option '--reference'"),
        (["parity", "no-bundle", "--reference", "x", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
    ],
)
def test_bad_usage_exits_with_2_and_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_reference_that_is_no_checkpoint_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_arguments: object, **_options: object) -> ParityReport:
        raise CheckpointError("x is no checkpoint; name a directory that is one")

    monkeypatch.setattr(package, "check_parity", refuse)
    assert main(["parity", "bundle", "--reference", "x"]) == 2
    assert capsys.readouterr().err == "bridgeport: x is no checkpoint; name a directory that is one\n"


def test_shipped_small_model(small_bundle: Path, held_out_picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole verb on trained weights: default pictures, then a file and a prompt of one's own."""
    words = ["parity", str(small_bundle), "--reference", str(checkpoint_path()), "--json", "--drill"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True
    assert document["tokens_match"] is True
    assert document["same_checkpoint"] is True
    assert document["drill"] is None
    assert {case["prompt"] for case in document["cases"]} > {""}
    assert main([*words, "--image", str(held_out_picture), "--prompt", "question: what is at top? answer:"]) == 0
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert [case["prompt"] for case in cases] == ["question: what is at top? answer:"]
    assert cases[0]["picture"].startswith("held-out.png, ")
