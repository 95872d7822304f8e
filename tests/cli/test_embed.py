"""`bridgeport embed`: the files, one line of progress, and bad input in one line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.runtime.generation import pictures

from bridgeport import cli
from bridgeport.runtime import Pipeline

GetPath = Callable[[str], Path]


@pytest.fixture(autouse=True)
def verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.VERBS, "embed", "bridgeport.runtime.cli.embed")


@pytest.fixture(scope="module")
def bundle(blip2_bundle: GetPath) -> str:
    return str(blip2_bundle("llama-gqa-tied"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("pictures") / "0.png"
    pictures(1)[0].save(file)
    return str(file)


def embed(bundle: str, picture: str, *options: str) -> int:
    return cli.main(["embed", bundle, "--image", picture, "--prompt", "a photo of", "--threads", "1", *options])


def test_the_tensor_for_vllm(
    bundle: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)  # a board that runs bundles has none of them
    out = tmp_path / "prompt.pt"
    assert embed(bundle, picture, "-o", str(out)) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"wrote {out}: ")
    tensor = torch.load(out, weights_only=True)
    with Pipeline.load(bundle, threads=1) as pipeline:
        prepared = pipeline.prepare([[picture]], "a photo of")
        expected, _ = pipeline.merge(prepared, [pipeline.encode(picture)[0]])
    np.testing.assert_array_equal(tensor.numpy(), expected[0])


def test_the_request_and_the_tables(bundle: str, picture: str, tmp_path: Path) -> None:
    request, tables = tmp_path / "request.json", tmp_path / "tables"
    options = ("--format", "vllm-request", "--model", "llm", "--max-tokens", "5", "--dtype", "bfloat16")
    assert embed(bundle, picture, "-o", str(request), *options) == 0
    assert json.loads(request.read_text())["max_tokens"] == 5
    assert embed(bundle, picture, "-o", str(tables), "--format", "tensorrt-llm") == 0
    assert sorted(file.name for file in tables.iterdir()) == [
        "image_features.safetensors", "input_ids.csv", "input_ids.npy", "input_token_extra_ids.npy", "prompt.json",
        "prompt_table.npy", "prompt_tasks.npy",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--format", "gguf"), "format 'gguf' is unknown; accepted are vllm, vllm-request, tensorrt-llm"),
        (("--format", "vllm-request"), "names the served model; give --model"),
        (("--dtype", "int8"), "dtype 'int8' is unknown"),
    ],
)
def test_bad_input_is_one_line(
    options: tuple[str, ...],
    said: str,
    bundle: str,
    picture: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert embed(bundle, picture, "-o", str(tmp_path / "x"), *options) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "form"),
    [
        ("bundle", "tensorrt-llm"),
        ("bundle/prompt", "tensorrt-llm"),
        ("bundle/manifest.json", "vllm"),
        ("p.png", "vllm"),
        ("link.png", "vllm-request"),
    ],
)
def test_what_is_read_is_not_replaced(
    out: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").mkdir()
    for file in ("bundle/manifest.json", "p.png"):
        (tmp_path / file).write_text("mine")
    (tmp_path / "link.png").symlink_to("p.png")
    options = ("-o", out, "--format", form, "--model", "llm", "--force")
    assert embed("bundle", "p.png", *options) == 2
    shown = capsys.readouterr().err
    assert re.fullmatch(r"bridgeport: \S+ would change (bundle|p\.png), which is read; name another place\n", shown)
    assert {file.read_text() for file in (tmp_path / "bundle" / "manifest.json", tmp_path / "p.png")} == {"mine"}
