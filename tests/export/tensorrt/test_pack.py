"""The archive for a bare board: the same bytes every time, and a script that builds and checks by itself."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tests.export.tensorrt.bundles import write_bundle
from tests.export.tensorrt.libcuda import compile_libcuda
from tests.tensorrt.conformance import Checker
from tests.tensorrt.double import install_double
from tests.tensorrt.engines import write_engines

from bridgeport.bundle import Bundle
from bridgeport.engine_record import BuildOptions
from bridgeport.errors import InputError, OutputError, UnsupportedError
from bridgeport.export.tensorrt import board
from bridgeport.export.tensorrt.board import Problem, compare
from bridgeport.export.tensorrt.devices import check_precisions
from bridgeport.export.tensorrt.pack import pack_bundle, write_archive
from bridgeport.runtime.tensorrt.api import load_api


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("pack") / "bundle")


@pytest.fixture(scope="module")
def archive(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("archive") / "model.tar.gz"
    options = BuildOptions(strip=True)
    return pack_bundle(bundle.path, out, "orin-nano", profiles=["batch=1,1,2"], options=options)


@pytest.fixture
def unpacked(archive: Path, tmp_path: Path) -> Path:
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_same_bundle_gives_the_same_bytes(archive: Path, bundle: Bundle, tmp_path: Path) -> None:
    again = tmp_path / "model.tar.gz"
    pack_bundle(bundle.path, again, "orin-nano", profiles=["batch=1,1,2"], options=BuildOptions(strip=True))
    assert again.read_bytes() == archive.read_bytes()
    with tarfile.open(archive) as opened:
        assert {(entry.mtime, entry.uid, entry.gid, entry.uname) for entry in opened} == {(0, 0, 0, "")}


def test_the_archive_has_all_that_a_board_needs(unpacked: Path, bundle: Bundle) -> None:
    for line in (unpacked / "SHA256SUMS").read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((unpacked / name).read_bytes()).hexdigest() == digest
    listed = {line.partition("  ")[2] for line in (unpacked / "SHA256SUMS").read_text().splitlines()}
    there = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert there == listed | {"SHA256SUMS"}
    assert {"README.txt", "build_and_check.py", "build_trtexec.sh", "build_polygraphy.sh", "pack.json"} <= listed
    assert Bundle.load(unpacked / "bundle").manifest == bundle.manifest  # it verifies as a bundle too
    document = json.loads((unpacked / "pack.json").read_text())
    llm = document["stages"][3]
    assert [case["profile"] for case in llm["cases"]] == [0, 1, 0, 1]  # a prefill and the step behind it, per picture
    assert llm["pools_mib"] == {"WORKSPACE": 1024, "TACTIC_DRAM": 2048}
    step = np.load(unpacked / llm["cases"][1]["inputs"]["past_key_values.0.key"])
    assert step.shape[2] == np.load(unpacked / llm["cases"][0]["inputs"]["inputs_embeds"]).shape[1] > 1


@pytest.mark.parametrize("version", ["10.3", "11.4"])
def test_the_board_builds_and_passes(
    version: str, unpacked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    double = install_double(monkeypatch, version)
    library = compile_libcuda(unpacked.parent)
    assert board.run(unpacked, [], build_only=False, cuda_library=library) is True
    double.check_order()
    assert "llm: passed, 4 recorded cases" in capsys.readouterr().out
    assert {path.name for path in (unpacked / "engines").iterdir()} == {
        f"{stage}.plan" for stage in ("encoder", "connector", "embed_tokens", "llm")
    }
    flags = {call.arguments["flag"].name for call in double.of("IBuilderConfig.set_flag")}
    assert flags == {"STRIP_PLAN", "REFIT_IDENTICAL"}
    built = len(double.of("Builder.build_serialized_network"))
    assert board.run(unpacked, ["llm"], build_only=False, cuda_library=library) is True
    assert len(double.of("Builder.build_serialized_network")) == built == 4  # the engine is used again


def test_an_engine_that_was_not_built_here_is_never_loaded(
    unpacked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have come with the archive, where SHA256SUMS does not know it, or be of another TensorRT."""
    double = install_double(monkeypatch, "10.3")
    library = compile_libcuda(unpacked.parent)
    plan = unpacked / "engines" / "connector.plan"
    plan.parent.mkdir()
    plan.write_bytes(b"code of somebody else")
    assert board.run(unpacked, ["connector"], build_only=False, cuda_library=library) is True
    assert "connector.plan was not built here of these files by this TensorRT" in capsys.readouterr().out
    assert plan.read_bytes() != b"code of somebody else"
    assert len(double.of("Builder.build_serialized_network")) == 1
    double = install_double(monkeypatch, "11.4")
    assert board.run(unpacked, ["connector"], build_only=False, cuda_library=library) is True
    assert len(double.of("Builder.build_serialized_network")) == 1


def test_a_module_that_was_added_to_the_archive_is_not_imported(unpacked: Path) -> None:
    """The script as it is started: its own folder is no place to look for modules."""
    for name in ("numpy", "argparse"):
        (unpacked / f"{name}.py").write_text("raise SystemExit('code of somebody else ran')\n")
    words = [sys.executable, "build_and_check.py", "--help"]
    ran = subprocess.run(words, cwd=unpacked, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "check them against recorded outputs" in ran.stdout


def test_engines_of_a_bundle_stay_behind(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run on the machine of their build alone; what is packed is a bundle of graphs."""
    install_double(monkeypatch, "10.3")
    built = write_engines(bundle, tmp_path / "engines", load_api(), profiles=["batch=1,1,2"])
    assert list(built.path.rglob("*.plan"))
    with tarfile.open(pack_bundle(built.path, tmp_path / "model.tar.gz", "orin-nano")) as opened:
        assert not [name for name in opened.getnames() if name.endswith(".plan")]
        opened.extractall(tmp_path, filter="data")
    packed = Bundle.load(tmp_path / "model" / "bundle").manifest
    assert {(stage.format, stage.engine) for stage in packed.stages} == {("onnx", None)}
    assert packed.stage("encoder").contract.axis("batch").max == 2


def test_a_precision_that_the_device_lacks(bundle: Bundle, tmp_path: Path) -> None:
    stages = tuple(
        stage.model_copy(update={"precision": "fp8"} if stage.contract.name == "encoder" else {})
        for stage in bundle.manifest.stages
    )
    with pytest.raises(UnsupportedError, match=r"--device orin-nano, stage encoder: FP8 needs compute capability 8\.9"):
        check_precisions(bundle.manifest.model_copy(update={"stages": stages}), "orin-nano")
    check_precisions(bundle.manifest.model_copy(update={"stages": stages}), "l4")


def test_a_wrong_engine_fails(
    unpacked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of eight channels that is 30 % too large."""
    install_double(monkeypatch, "10.3")
    file = unpacked / "data/connector/0/outputs/0.npy"
    array = np.load(file)
    array[..., 0] *= 1.3
    np.save(file, array)
    (unpacked / "SHA256SUMS").write_text("")
    library = compile_libcuda(unpacked.parent)
    assert board.run(unpacked, ["connector"], build_only=False, cuda_library=library) is False
    assert "FAILED (least 0.9999)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "bundle/llm/decoder.onnx").write_bytes(b"x"), "decoder.onnx was changed"),
        (lambda root: (root / "pack.json").unlink(), "pack.json is missing; unpack the archive again"),
        (lambda root: (root / "build_and_check.py").write_text("#"), "build_and_check.py was changed"),
    ],
)
def test_a_changed_archive_is_refused(change: object, said: str, unpacked: Path) -> None:
    change(unpacked)  # type: ignore[operator]
    with pytest.raises(Problem, match=said):
        board.run(unpacked, [], build_only=False)


def test_what_the_board_lacks_is_said(unpacked: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(Problem, match="apt install python3-libnvinfer"):
        board.run(unpacked, [], build_only=True)
    install_double(monkeypatch, "10.3")
    with pytest.raises(Problem, match="there is no NVIDIA driver here"):
        board.run(unpacked, [], build_only=True, cuda_library=str(tmp_path / "libcuda.so.1"))
    with pytest.raises(Problem, match=r"there is no stage decoder; see pack.json"):
        board.run(unpacked, ["decoder"], build_only=True)
    install_double(monkeypatch, "10.3", fail_build="Error Code 2: OutOfMemory")
    with pytest.raises(Problem, match="encoder: not built, see the messages above; when memory ran out"):
        board.run(unpacked, [], build_only=True, cuda_library=compile_libcuda(tmp_path))
    assert not (unpacked / "engines").exists()


def test_the_script_is_for_python_3_10_and_needs_nothing_else(unpacked: Path) -> None:
    text = (unpacked / "build_and_check.py").read_text()
    tree = ast.parse(text, feature_version=(3, 10))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }
    allowed = {"__future__", "argparse", "ctypes", "hashlib", "json", "os", "sys", "pathlib", "typing"}
    assert imported <= allowed | {"numpy", "tensorrt"}


def test_the_script_uses_only_what_each_tensorrt_has() -> None:
    text = Path(board.__file__).read_text()
    assert Checker().check({"board.py": text}) == []
    assert Checker().check({"board.py": text.replace("set_input_shape", "set_binding_shape")}) != []


def test_comparing() -> None:
    a = np.array([[3.0, 4.0], [0.0, 0.0]], np.float16)
    assert compare(a, a) == (1.0, 0.0)
    assert compare(a, np.array([[3.0, 4.0], [0.0, 1.0]]))[0] == 0.0  # a row of zeros that should not be one
    assert compare(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == (-1.0, float("inf"))
    assert compare(np.zeros((1, 0, 4)), np.zeros((1, 0, 4))) == (1.0, 0.0)
    with pytest.raises(Problem, match=r"an output is \[1\], recorded is \[2\]"):
        compare(np.zeros(1), np.zeros(2))


def test_profiles_that_hold_no_recorded_input(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recorded input of stage encoder lies inside a profile .axis 0"):
        pack_bundle(bundle.path, tmp_path / "a.tar.gz", profiles=["batch=2,4,8"])
    assert list(tmp_path.iterdir()) == []


def test_bad_outputs_and_bundles(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not end in .tar.gz"):
        pack_bundle(bundle.path, tmp_path / "a.zip")
    (tmp_path / "a.tar.gz").write_text("kept")
    with pytest.raises(OutputError, match="exists; name another place"):
        pack_bundle(bundle.path, tmp_path / "a.tar.gz")
    assert (tmp_path / "a.tar.gz").read_text() == "kept"
    other = write_bundle(tmp_path / "cpu", target="cpu", domain="com.microsoft")
    with pytest.raises(UnsupportedError, match=r"operators of com.microsoft"):
        pack_bundle(other.path, tmp_path / "b.tar.gz")


def test_an_archive_does_not_depend_on_times_or_order(tmp_path: Path) -> None:
    import os

    packed = []
    for names in (("b", "a"), ("a", "b")):
        root = tmp_path / names[0] / "root"
        root.mkdir(parents=True)
        for number, name in enumerate(names):
            (root / name).write_text(name)
            os.utime(root / name, (number, number))
        write_archive(root, tmp_path / "out")
        packed.append((tmp_path / "out").read_bytes())
    assert packed[0] == packed[1]
