"""`bridgeport build` and `bridgeport pack` as they are typed."""

from __future__ import annotations

import io
import json
from importlib import import_module
from pathlib import Path

import pytest
from tests.export.tensorrt.bundles import MACHINE, write_bundle
from tests.tensorrt.double import install_double

from bridgeport import cli
from bridgeport.bundle import Bundle
from bridgeport.export.tensorrt import build
from bridgeport.export.tensorrt.sign import sign_bundle
from bridgeport.export.tensorrt.worker import Reporter, build_stage


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("cli") / "bundle")


@pytest.fixture(autouse=True)
def _verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    for verb in ("build", "pack"):
        monkeypatch.setitem(cli.VERBS, verb, f"bridgeport.export.cli.{verb}")


def test_build_prints_what_was_built(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_double(monkeypatch, "10.3")
    monkeypatch.setenv("BRIDGEPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "find_build_machine", lambda: MACHINE)
    monkeypatch.setattr(build, "run_child", lambda job, _: build_stage(job, Reporter(io.StringIO())))
    out = tmp_path / "engines"
    words = ["build", str(bundle.path), "-o", str(out), "--profile", "batch=1,1,2", "--no-timing-cache"]
    assert cli.main([*words, "--log", str(tmp_path / "log"), "--skip-preflight", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == ""
    assert document["machine"]["jetpack"] == "6.2"
    assert [stage["plan"] for stage in document["stages"]] == [
        "encoder/model.plan",
        "connector/model.plan",
        "llm/embed_tokens.plan",
        "llm/decoder.plan",
    ]
    assert [profile["name"] for profile in document["stages"][3]["profiles"]] == ["prefill", "decode"]
    assert (tmp_path / "log").read_text().count("== stage ") == 4
    assert list((tmp_path / "cache").rglob("*.cache")) == []


def test_emit_goes_to_stdout_or_to_a_file(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", str(bundle.path), "--emit", "trtexec", "--device", "orin-nano"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/sh\n# Builds the TensorRT engines of A for Jetson Orin Nano 8 GB (JetPack 6.1")
    words = ["build", str(bundle.path), "--emit", "trtexec", "--device", "orin-nano", "-o", str(tmp_path / "build.sh")]
    assert cli.main(words) == 0
    assert (tmp_path / "build.sh").read_text() == script
    assert cli.main(words) == 2
    assert "exists; name another file, or replace it with --force" in capsys.readouterr().err


def test_pack_says_what_to_do_next(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.tar.gz"
    assert cli.main(["pack", str(bundle.path), "-o", str(out), "--device", "orin-nano"]) == 0
    assert "tar xzf model.tar.gz && cd model && python3 build_and_check.py" in capsys.readouterr().out
    assert cli.main(["pack", str(bundle.path), "-o", str(out), "--force", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"archive": str(out), "bytes": out.stat().st_size, "device": "local", "signed": False}


def test_inspect_reads_a_bundle_only_with_the_signature_of_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = pytest.importorskip("cryptography.hazmat.primitives.serialization", reason="pip install 'bridgeport[sign]'")
    ed25519 = import_module("cryptography.hazmat.primitives.asymmetric.ed25519")
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = tmp_path / "key.pem", tmp_path / "public.pem"
    private.write_bytes(key.private_bytes(to.Encoding.PEM, to.PrivateFormat.PKCS8, to.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(to.Encoding.PEM, to.PublicFormat.SubjectPublicKeyInfo))
    folder = write_bundle(tmp_path / "bundle").path
    words = ["inspect", str(folder), "--public-key", str(public)]
    assert cli.main(words) == 2
    assert "manifest.json is not signed" in capsys.readouterr().err
    sign_bundle(folder, private)
    assert cli.main(words) == 0
    assert "signed with the key" in capsys.readouterr().out.replace("\n", " ")
    with (folder / "manifest.json").open("a") as manifest:
        manifest.write("\n")
    assert cli.main([*words, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "was not signed with the key" in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["build", "BUNDLE"], "name the bundle to write with -o BUNDLE, or a tool with --emit"),
        (["build", "BUNDLE", "-o", "x", "--profile", "batch"], "'batch' is not AXIS=MIN,OPT,MAX"),
        (["build", "BUNDLE", "-o", "x", "--device", "orin"], "--device 'orin' is unknown"),
        (["build", "BUNDLE", "-o", "x", "--optimization-level", "6"], "--optimization-level"),
        (["build", "BUNDLE", "-o", "x", "--hardware-compatibility", "all"], "accepted are NONE, AMPERE_PLUS, SAME_"),
        (["build", "BUNDLE", "-o", "x", "--timing-cache", "y", "--no-timing-cache"], "exclude each other"),
        (["build", "BUNDLE", "--emit", "make"], "--emit 'make' is unknown; accepted are trtexec, polygraphy"),
        (["build", "BUNDLE", "--emit", "trtexec", "--sign", "x", "--json"], "builds nothing; leave --sign, --json out"),
        (["build", "BUNDLE", "--emit", "trtexec", "-o", "BUNDLE/manifest.json", "--force"], "never changed; name a pl"),
        (["pack", "BUNDLE", "-o", "BUNDLE/x.tar.gz"], "x.tar.gz lies in the bundle"),
        (["build", "/nowhere", "-o", "x"], "/nowhere does not exist"),
        (["pack", "BUNDLE", "-o", "x.zip"], "x.zip does not end in .tar.gz"),
        (["pack", "BUNDLE", "-o", "BUNDLE/../bundle/manifest.json/x.tar.gz"], "x.tar.gz lies in the bundle"),
        (["pack", "BUNDLE", "-o", "x" * 300 + ".tar.gz"], "File name too long); name another place"),
        (["build", "BUNDLE", "-o", "x" * 300], "File name too long); name another place"),
        (["build", "BUNDLE", "--emit", "trtexec", "-o", "/dev/null/x"], "File exists); name another place"),
    ],
)
def test_bad_usage(words: list[str], said: str, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word.replace("BUNDLE", str(bundle.path)) for word in words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
