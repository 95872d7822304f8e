"""The loader's guards against NVIDIA's genuine lean runtime, which crashes the process where no driver is.

It is the only library of TensorRT that a package index holds whole. With a folder of wheels:
BRIDGEPORT_TENSORRT_WHEELS=DIR pytest tests/tensorrt/test_lean.py (tensorrt_lean_cu13_bindings, tensorrt_lean_cu13_libs)
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.export.tensorrt.bundles import write_bundle
from tests.tensorrt.engines import install_doubles, write_engines
from tests.tensorrt.test_live_bindings import VARIABLE

from bridgeport.runtime.tensorrt import loader

PACKAGES = ("tensorrt_lean_cu13_bindings", "tensorrt_lean_cu13_libs")
PIN = "==11.4.0.*"
CRASH = """
import tensorrt
runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.INTERNAL_ERROR))
print("made", runtime is not None, flush=True)
runtime.deserialize_cuda_engine(b"not a plan at all")
"""
LOAD = """
import sys
from bridgeport.bundle import Bundle
from bridgeport.errors import BridgeportError
from bridgeport.runtime.backends import EngineOptions
from bridgeport.runtime.tensorrt import load_engines
try:
    load_engines(Bundle.load(sys.argv[1]), EngineOptions())
except BridgeportError as error:
    print(type(error).__name__, error)
"""


def has_driver() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0  # type: ignore[no-any-return]
    except OSError:
        return False


pytestmark = pytest.mark.skipif(has_driver(), reason="shows what happens without an NVIDIA driver, and one is here")


def unpack(wheels: Path, out: Path) -> Path:
    """The lean runtime as a module `tensorrt` in `out`; skips where a wheel is missing."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for package in PACKAGES:
        found = [
            file for file in wheels.glob(f"{package}-11.4.*.whl") if f"-{tag}-" in file.name or "-py3-" in file.name
        ]
        if not found:
            pytest.skip(f"no {package}-11.4.* wheel for {tag} in {wheels}")
        zipfile.ZipFile(found[0]).extractall(out)
    (out / "tensorrt.py").write_text(
        "from tensorrt_lean_bindings import *\nfrom tensorrt_lean_bindings import __version__\n"
    )
    return out


def run(module: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(module)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def check_guards(module: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trial = loader._run_trial
    unguarded = run(module, CRASH)
    assert "made True" in unguarded.stdout
    assert unguarded.returncode == -11, "the reason for the guards: it crashes"

    with pytest.MonkeyPatch.context() as patch:
        doubles = install_doubles(patch, tmp_path)
        bundle = write_engines(write_bundle(tmp_path / "bundle"), tmp_path / "engines", doubles.api)
    guarded = run(module, LOAD, str(bundle.path))
    assert guarded.returncode == 0, guarded.stderr
    assert guarded.stdout.startswith("DependencyError there is no NVIDIA driver here")

    monkeypatch.setenv("PYTHONPATH", str(module))
    plan = bundle.path / "encoder" / "model.plan"
    sha = next(one.sha256 for one in bundle.manifest.files if one.path == "encoder/model.plan")
    assert "was ended by SIGSEGV" in str(trial([str(plan), sha, "plain"])), "the child takes the crash"


def test_guards_with_wheels_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"set {VARIABLE} to a folder with the lean runtime's wheels, or run the slow test")
    check_guards(unpack(Path(folder), tmp_path / "module"), monkeypatch, tmp_path)


@pytest.mark.slow  # fetches 45 MB
def test_guards_with_wheels_of_the_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    named = [f"{package}{PIN}" for package in PACKAGES]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), *named]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    if done.returncode != 0:
        pytest.skip(f"{', '.join(named)} cannot be fetched: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    check_guards(unpack(wheels, tmp_path / "module"), monkeypatch, tmp_path)
