"""The adapter over cuda-python: what it names is in the genuine module, and what fails says so."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.tensorrt.cuda_double import CudaDouble, Functions, install_cuda_double
from tests.tensorrt.test_live_bindings import VARIABLE

from bridgeport.errors import EngineError
from bridgeport.runtime.tensorrt import memory
from bridgeport.runtime.tensorrt.memory import load_cuda

LIVE = """
import json
from cuda.bindings import runtime
functions = {name: getattr(runtime, name) for name in dir(runtime) if name.startswith("cuda")}
names = {name: (function.__doc__ or "").strip().split("\\n")[0] for name, function in functions.items()}
ways = ("HostToDevice", "DeviceToHost", "DeviceToDevice")
kinds = ["cudaMemcpy" + way in runtime.cudaMemcpyKind.__members__ for way in ways]
mode = "cudaStreamCaptureModeThreadLocal" in runtime.cudaStreamCaptureMode.__members__
memory = "cudaErrorMemoryAllocation" in runtime.cudaError_t.__members__
status = runtime.cudaMalloc(16)
print(json.dumps([names, all(kinds) and mode and memory, runtime.cudaGetErrorName(status[0])[1].decode(), len(status)]))
"""


def used_functions() -> dict[str, set[int]]:
    """Function of CUDA -> with how many arguments the adapter calls it."""
    found: dict[str, set[int]] = {}
    for node in ast.walk(ast.parse(Path(memory.__file__).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, count = node.func.attr, len(node.args)
        if name == "_call" and isinstance(node.args[0], ast.Constant):
            name, count = str(node.args[0].value), count - 1
        if name.startswith("cuda"):
            found.setdefault(name, set()).add(count)
    return found


def test_the_double_has_what_is_used() -> None:
    modelled = {name: getattr(Functions, name).__code__.co_argcount - 1 for name in vars(Functions(CudaDouble()))}
    used = used_functions()
    assert len(used) >= 20
    assert {name: {count} for name, count in modelled.items()} == used


def test_the_genuine_module(tmp_path: Path) -> None:
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"set {VARIABLE} to a folder with the wheels of cuda_bindings and cuda_pathfinder")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for pattern in (f"cuda_bindings-*-{tag}-*.whl", "cuda_pathfinder-*.whl"):
        wheels = sorted(Path(folder).glob(pattern))
        if not wheels:
            pytest.skip(f"no {pattern} in {folder}")
        zipfile.ZipFile(wheels[-1]).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LIVE], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    signatures, members, error, results = json.loads(done.stdout)
    assert members
    assert error.startswith("cuda"), "an error has a name"
    assert results == 2, "status and result"
    for name, counts in used_functions().items():
        arguments = re.fullmatch(r"\w+\((.*)\)", signatures[name])
        assert arguments is not None, signatures[name]
        assert counts == {len([one for one in arguments[1].split(",") if one.strip()])}, name


@pytest.mark.parametrize("call", ["free", "free_pinned", "destroy_stream"])
def test_a_failure_names_function_and_error(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    install_cuda_double(monkeypatch)
    cuda: Any = load_cuda()
    with pytest.raises(EngineError, match=r"CUDA: cuda\w+ failed with cudaErrorInvalidValue; see `bridgeport doctor`"):
        getattr(cuda, call)(12345)
