"""`bridgeport inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridgeport.bundle import Bundle
from bridgeport.cli import main


def test_inspect_shows_every_stage_axis_and_hash(small_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small_bundle)]) == 0
    shown = capsys.readouterr().out
    manifest = Bundle.load(small_bundle).manifest
    for stage in manifest.stages:
        assert stage.contract.name in shown
        assert stage.precision in shown
    assert manifest.prompt is not None
    assert manifest.prompt.image_token in shown
    assert str(manifest.prompt.image_token_id) in shown
    assert manifest.files[0].sha256[:8] in shown


def test_inspect_json_is_the_manifest_and_sizes_add_up(small_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small_bundle), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [stage["contract"]["name"] for stage in document["stages"]] == [
        "encoder",
        "connector",
        "embed_tokens",
        "llm",
    ]
    graphs = sum(file["size"] for file in document["files"] if ".onnx" in file["path"])
    assert sum(stage["bytes"] for stage in document["stages"]) == graphs


def test_inspect_shows_a_path_with_brackets_as_it_is(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "[bold] bundle").symlink_to(small_bundle)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "[bold] bundle"]) == 0
    assert "[bold] bundle" in capsys.readouterr().out
