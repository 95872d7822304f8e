"""`bridgeport demo`, the main job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridgeport.cli import main


def test_demo_exports_runs_proves_scores_and_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = tmp_path / "kept"
    assert main(["demo", "--keep", str(keep), "--pictures", "12", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["parity"]["passed"]
    torch, fp32, int8, int4 = document["scores"]
    assert (fp32["captions"], fp32["answers"]) == (torch["captions"], torch["answers"])
    # 12 captions leave room for a hard one; a chain that is broken somewhere gets none right.
    assert fp32["captions"] >= 8
    assert min(int8["captions"], int4["captions"]) >= 6
    assert int8["megabytes"] < int4["megabytes"] < fp32["megabytes"]
    assert len(document["shown"]) == 6
    pictures = {f"picture-{number}.png" for number in range(3)}
    assert {path.name for path in keep.iterdir()} == {"fp32", "int8", "int4"} | pictures
    assert main(["inspect", str(keep / "int4")]) == 0


def test_demo_never_writes_into_a_directory_that_holds_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert main(["demo", "--keep", str(tmp_path)]) == 2
    assert "is not an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
