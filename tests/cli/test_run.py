"""`bridgeport run`: text, JSON, streaming, the attention map, and bad input in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bridgeport.cli import main
from bridgeport.export.tensorrt import sign_bundle
from bridgeport.runtime import Pipeline, pipeline
from bridgeport.runtime.backends import load_engines

GetPath = Callable[[str], Path]
PROMPT = "a photo of"


@pytest.fixture(scope="module")
def bundle(blip2_bundle: GetPath) -> str:
    return str(blip2_bundle("llama-gqa-tied"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from tests.runtime.generation import pictures

    folder = tmp_path_factory.mktemp("pictures")
    names = []
    for index, image in enumerate(pictures()):
        names.append(str(folder / f"{index}.png"))
        image.save(names[-1])
    return names


def run(bundle: str, images: list[str], *options: str) -> int:
    words = [word for image in images for word in ("--image", image)]
    return main(["run", bundle, *words, "--threads", "1", "--max-new-tokens", "5", *options])


def refuse(capsys: pytest.CaptureFixture[str], bundle: str, images: list[str], *options: str) -> str:
    """The one line on stderr of a run that must exit with 2 and print nothing on stdout."""
    assert run(bundle, images, *options) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("bridgeport: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_text_streams_to_stdout_and_timings_to_stderr(
    bundle: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with Pipeline.load(bundle, threads=1) as pipeline:
        text = pipeline.generate(files[0], PROMPT, max_new_tokens=5).text
    for options in ([], ["--no-stream"]):
        assert run(bundle, files[:1], "--prompt", PROMPT, *options) == 0
        shown = capsys.readouterr()
        assert shown.out == text + "\n"
        assert all(stage in shown.err for stage in ("preprocess", "encoder", "connector", "prefill", "decode", "total"))


def test_json_of_one_picture(bundle: str, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bundle, files[:1], "--prompt", PROMPT, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    with Pipeline.load(bundle, threads=1) as pipeline:
        expected = pipeline.generate(files[0], PROMPT, max_new_tokens=5)
    assert document["text"] == expected.text
    assert document["token_ids"] == list(expected.token_ids)
    assert document["finish_reason"] == "length"
    assert document["prompt_tokens"] == expected.prompt_tokens
    assert set(document["timings_ms"]) == {"preprocess", "encoder", "connector", "prefill", "decode", "total"}
    assert document["image"] == files[0]


def test_json_of_several_pictures(bundle: str, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bundle, files, "--prompt", PROMPT, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    alone = []
    for file in files:
        assert run(bundle, [file], "--prompt", PROMPT, "--json") == 0
        alone.append(json.loads(capsys.readouterr().out))
    keys = ("image", "text", "token_ids", "finish_reason", "prompt_tokens")
    assert document["results"] == [{key: each[key] for key in keys} for each in alone]
    assert set(document) == {"results", "timings_ms", "tokens_per_second"}


def test_several_pictures_as_text(bundle: str, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bundle, files[:2]) == 0
    shown = capsys.readouterr().out
    assert all(f"{file}: " in shown for file in files[:2])


def test_sampling_options(bundle: str, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "1.2", "--top-k", "50", "--top-p", "0.9", "--repetition-penalty", "1.3", "--seed"]
    tokens = []
    for seed in ("4", "4", "5"):
        assert run(bundle, files[:1], *options, seed, "--json") == 0
        tokens.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert tokens[0] == tokens[1] != tokens[2]


def test_attention_map(bundle: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "map.png"
    assert run(bundle, files[:1], "--attention-map", str(target), "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["token_ids"]
    assert f"wrote {target}" in shown.err
    with Image.open(target) as image:
        assert image.format == "PNG"


def test_attention_map_is_refused_before_anything_runs(
    bundle: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = refuse(capsys, bundle, files, "--attention-map", str(tmp_path / "map.png"))
    assert "--attention-map draws one picture, 3 came" in several
    assert "name a file that ends in .png" in refuse(
        capsys, bundle, files[:1], "--attention-map", str(tmp_path / "a.gif")
    )
    assert list(tmp_path.iterdir()) == []


def test_bad_pictures(bundle: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, cut, empty, bomb = (tmp_path / name for name in ("text.png", "cut.png", "empty.png", "bomb.png"))
    text.write_text("no picture")
    cut.write_bytes(Path(files[0]).read_bytes()[:900])
    empty.write_bytes(b"")
    Image.new("1", (20_000, 10_000)).save(bomb)
    for file, said in (
        (text, "is not a picture that Pillow can read"),
        (cut, "cannot be decoded"),
        (empty, "is not a picture that Pillow can read"),
        (bomb, "decompression bombs"),
        (tmp_path / "absent.png", "does not exist"),
        (tmp_path, "is a directory"),
    ):
        line = refuse(capsys, bundle, [files[0], str(file)], "--json")
        assert said in line
        assert str(file) in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", "z" * 400], "the context holds 128; shorten the prompt"),
        (["--max-new-tokens", "500"], "ask for at most"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0; accepted is a whole number from 1 up"),
        (["--top-p", "1.5"], "top_p is 1.5; accepted is a number above 0, at most 1"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-k", "x"], "--top-k"),
        (["--seed", "-2"], "seed is -2"),
        (["--threads", "0"], "threads is 0"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_options(
    bundle: str, files: list[str], options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refuse(capsys, bundle, files[:1], *options)


def test_another_engine(bundle: str, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bundle, files[:1], "--json", "--engine", "onnxruntime") == 0
    assert json.loads(capsys.readouterr().out)
    assert "engine 'onnx' is unknown; known are onnxruntime, " in refuse(capsys, bundle, files[:1], "--engine", "onnx")


def test_an_engine_runs_the_stages(bundle: str, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load(name: str | None, *rest: Any) -> Any:
        seen.append(name)
        return load_engines(name, *rest)

    monkeypatch.setattr(pipeline, "load_engines", load)
    assert run(bundle, files[:1], "--engine", "torch") == 2  # needs a checkpoint, which it says
    assert seen == ["torch"]


def test_only_a_signed_bundle(
    bundle: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asymmetric = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    to = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    key, other = (asymmetric.Ed25519PrivateKey.generate() for _ in range(2))
    for name, one in (("public", key), ("other", other)):
        pem = one.public_key().public_bytes(to.Encoding.PEM, to.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pem").write_bytes(pem)
    plain = to.NoEncryption()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(to.Encoding.PEM, to.PrivateFormat.PKCS8, plain))
    signed = tmp_path / "signed"
    shutil.copytree(bundle, signed)
    public, wrong = ["--public-key", str(tmp_path / "public.pem")], ["--public-key", str(tmp_path / "other.pem")]
    assert "manifest.json is not signed" in refuse(capsys, str(signed), files[:1], *public)
    sign_bundle(signed, tmp_path / "key.pem")
    assert run(str(signed), files[:1], *public) == 0
    capsys.readouterr()
    assert "was not signed with the key" in refuse(capsys, str(signed), files[:1], *wrong)


def test_a_picture_is_needed(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", bundle]) == 2
    said = capsys.readouterr().err
    assert "takes no prompt without one; give a picture" in said
    assert said.count("\n") == 1


def flip_a_byte(bundle: Path) -> None:
    file = bundle / "llm" / "decoder.onnx.data"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def remove_a_file(bundle: Path) -> None:
    (bundle / "encoder" / "model.onnx").unlink()


def make_newer(bundle: Path) -> None:
    file = bundle / "manifest.json"
    document: dict[str, Any] = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"schema_version": 99}))


def point_outside(bundle: Path) -> None:
    import onnx

    from bridgeport.bundle import read_manifest, write_manifest

    file = bundle / "encoder" / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../weights.data"
    onnx.save(model, file)
    write_manifest(bundle, read_manifest(bundle))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_byte, "the file was changed after export"),
        (remove_a_file, "encoder/model.onnx is missing"),
        (make_newer, "schema_version 99, newer than"),
        (point_outside, "points to external data at '../../weights.data'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_bundles(
    bundle: str,
    files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    damage(copy)
    assert said in refuse(capsys, str(copy), files[:1])
