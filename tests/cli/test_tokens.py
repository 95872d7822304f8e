"""`bridgeport tokens`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoints_llava import write_llava_checkpoint
from tests.export.test_simplified_qformer import with_one_layer

from bridgeport.bundle import Bundle
from bridgeport.cli import main
from bridgeport.export.tokens import connectors
from bridgeport.export.tokens.known import KNOWN

Captured = pytest.CaptureFixture[str]

SCRIPT = """
import sys

class Blocker:
    names = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "psutil"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
from bridgeport.cli import main
sys.exit(main(["tokens", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AnyRes over 28-pixel tiles of 4x4 patches, without its weights."""
    directory = write_llava_checkpoint(tmp_path_factory.mktemp("llava-next"), anyres=True)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    return directory


@pytest.fixture(scope="module")
def bundle(blip2_bundle: Callable[[str], Path]) -> Path:
    return blip2_bundle("llama-gqa-tied")


def document(capsys: Captured, *words: str) -> dict[str, Any]:
    assert main(["tokens", *words, "--json"]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def test_without_a_model_it_prints_the_well_known_table(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")  # what is written to a file is not cut to it
    assert main(["tokens", "--image-size", "672x672"]) == 0
    rows = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    shown = {(row[1], row[2]): row[3:10] for row in rows if len(row) == 11 and row[9]}
    assert shown["llava-1.5-7b", "672x672"] == ["1", "576", "576", "1.0x", "576", "4,096", "3,520"]
    assert shown["blip2-opt-2.7b", "672x672"] == ["1", "257", "32", "8.0x", "32", "4,096", "4,064"]
    before = shown["llava-next-7b", "672x672, before unpadding"]
    assert before == ["5", "2,880", "2,880", "1.0x", "2,880", "4,096", "1,216"]
    assert shown["llava-next-7b", "672x672"][4:] == ["2,928", "4,096", "1,168"]


def test_a_checkpoint_directory_needs_no_weights(checkpoint: Path, capsys: Captured) -> None:
    (model,) = document(capsys, str(checkpoint), "--image-size", "56x56")["models"]
    (picture,) = model["pictures"]
    # A 2x2 grid and the view: 5 tiles of 16 features; 8 rows end with a newline each.
    assert (picture["tiles"], picture["features"], picture["tokens"]) == (5, 80, 88)
    assert (model["context"], picture["left"]) == (512, 512 - 88)
    assert model["connector"] == "NewlineProjector"
    assert model["parameters"]["connector"] == (24 + 1) * 32 + (32 + 1) * 32 + 32
    assert picture["flops"]["connector"] == 2 * 80 * 32 * (24 + 32)


def test_a_custom_connector_counts_its_own_tokens(tmp_path: Path, capsys: Captured) -> None:
    """It is built on the CPU, and the checkpoint's processor writes another number of image tokens."""
    sizes = {"width": 48, "num_heads": 3, "num_queries": 5}
    checkpoint = with_one_layer(write_llava_checkpoint(tmp_path / "checkpoint"), sizes)
    (model,) = document(capsys, str(checkpoint), "--image-size", "100x37")["models"]
    (picture,) = model["pictures"]
    assert (picture["encoder_tokens"], picture["features"], picture["tokens"]) == (16, 5, 5)
    assert picture["left"] == model["context"] - 5 - picture["marks"]
    q, n, d, v, out = 5, 16, 48, 24, 32
    attend = 2 * q * d * d * 2 + 2 * n * v * d * 2 + 2 * 2 * q * n * d
    assert picture["flops"]["connector"] == attend + 2 * 2 * q * d * 4 * d + 2 * q * d * out


def test_a_reduced_bundle_is_counted_with_its_reduction(bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    reduced = tmp_path / "bundle"
    shutil.copytree(bundle, reduced)
    manifest = json.loads((reduced / "manifest.json").read_text(encoding="utf-8"))
    (stage,) = (one for one in manifest["stages"] if one["contract"]["name"] == "connector")
    stage["contract"]["outputs"][0]["shape"][1] = manifest["image"]["tiling"]["tokens"] = 2
    manifest["reduction"] = {"method": "queries", "amount": 2}
    (reduced / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    whole, fewer = document(capsys, str(bundle), str(reduced), "--image-size", "64x64")["models"]
    assert fewer["pictures"][0]["features"] == 2
    assert fewer["connector"] == whole["connector"] == "Blip2Connector"
    assert 0 < fewer["pictures"][0]["flops"]["connector"] < whole["pictures"][0]["flops"]["connector"]
    assert fewer["pictures"][0]["flops"]["encoder"] == whole["pictures"][0]["flops"]["encoder"]


def test_a_bundle_is_measured_in_onnx_runtime(bundle: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connectors, "ENCODERS", ((9, 16),))
    found = document(capsys, str(bundle), "--image-size", "64x48", "--measure", "--rounds", "2")
    manifest = Bundle.load(bundle).manifest
    assert manifest.generation is not None
    (model,) = found["models"]
    (picture,) = model["pictures"]
    _, queries, _ = manifest.stage("connector").contract.outputs[0].shape
    assert (picture["features"], picture["tokens"]) == (queries, queries)
    assert picture["left"] == manifest.generation.context_length - picture["tokens"] - picture["marks"]
    for stage in ("encoder", "connector"):
        timing = picture["latency"][stage]
        assert timing["engine"] == "ONNX Runtime"
        assert timing["rounds"] == 2
        assert timing["ms"] > 0
    assert [one["connector"] for one in found["connectors"]] == list(connectors.CONNECTORS)
    assert all(one["latency"]["PyTorch"]["ms"] > 0 for one in found["connectors"])


def test_a_checkpoint_is_measured_in_pytorch(checkpoint: Path, capsys: Captured) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connectors, "compare_connectors", lambda **_: ())
        assert main(["tokens", str(checkpoint), "--image-size", "28x28", "--measure", "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "PyTorch" in shown
    assert "Time on this machine" in shown


def test_a_context_that_is_too_small_is_said_and_shown_as_0(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["tokens", "internvl3-1b", "--image-size", "1344x1344", "--context", "1000"]) == 0
    out, err = capsys.readouterr()
    assert "0 !" in out
    assert "internvl3-1b: a picture of 1344x1344 takes 2560 tokens, more than the context of 1000" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing-7b"], "'nothing-7b' is neither a directory nor a model known by name; known are llava-1.5-7b, "),
        (["llava-1.5-7b", "--image-size", "336"], "--image-size '336' is no size; give WIDTHxHEIGHT in pixels"),
        (["llava-1.5-7b", "--image-size", "0x0"], "--image-size '0x0' is an empty picture"),
        (["llava-1.5-7b", "--image-size", "-4x4"], "--image-size '-4x4' is no size"),
        (["llava-1.5-7b", "--context", "0"], "--context"),
        (["qwen2-vl-2b", "--image-size", "4000x10"], "aspect ratio of 400"),
        (["{empty}"], "is no checkpoint: it has no config.json"),
        (["{file}"], "is a file; a checkpoint is a local directory"),
        (["{other}"], "model_type 'bert' is unknown"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words: list[str], said: str, tmp_path: Path, capsys: Captured) -> None:
    places = {name: tmp_path / name for name in ("empty", "file", "other")}
    places["empty"].mkdir()
    places["other"].mkdir()
    places["file"].touch()
    (places["other"] / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    assert main(["tokens", *(word.format(**places) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_an_unknown_name_lists_all_that_are_known(capsys: Captured) -> None:
    assert main(["tokens", "llava"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in KNOWN)


def run_without_torch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_without_torch_bundles_and_known_models_are_counted(bundle: Path, capsys: Captured) -> None:
    words = (str(bundle), "llava-next-7b", "--image-size", "672x672")
    done = run_without_torch(*words, "--json")
    assert done.returncode == 0, done.stderr
    alone, whole = json.loads(done.stdout)["models"], document(capsys, *words)["models"]
    for ours, theirs in zip(alone, whole, strict=True):
        assert (ours["parameters"], ours["connector"]) == ({}, None)
        keys = ("tiles", "features", "tokens", "marks", "left", "fits", "unpadded_from")
        assert {key: ours["pictures"][0][key] for key in keys} == {key: theirs["pictures"][0][key] for key in keys}
    assert alone[0]["pictures"][0]["encoder_tokens"] == whole[0]["pictures"][0]["encoder_tokens"]


def test_without_torch_a_checkpoint_directory_says_what_to_install(checkpoint: Path) -> None:
    done = run_without_torch(str(checkpoint))
    assert done.returncode == 2
    assert "needs torch and transformers; install them with" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_bundle_that_gives_fewer_tokens_than_its_config_is_taken_at_its_word(
    bundle: Path, tmp_path: Path, capsys: Captured
) -> None:
    """As an export option makes one: the config that it keeps would make other modules."""
    reduced = tmp_path / "bundle"
    shutil.copytree(bundle, reduced)
    manifest = json.loads((reduced / "manifest.json").read_text(encoding="utf-8"))
    (stage,) = (one for one in manifest["stages"] if one["contract"]["name"] == "connector")
    stage["contract"]["outputs"][0]["shape"][1] = 3
    manifest["image"]["tiling"]["tokens"] = 3
    (reduced / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (model,) = document(capsys, str(reduced), "--image-size", "64x64")["models"]
    assert (model["pictures"][0]["features"], model["pictures"][0]["tokens"]) == (3, 3)
    assert (model["parameters"], model["pictures"][0]["flops"]) == ({}, {})
