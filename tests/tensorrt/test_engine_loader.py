"""What must hold before a plan is deserialised, and what a plan that does not load does: nothing to this process."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.export.tensorrt.bundles import write_bundle
from tests.tensorrt.double import write_module
from tests.tensorrt.engines import MACHINE, Doubles, install_doubles, write_engines

from bridgeport.bundle import Bundle, write_manifest
from bridgeport.engine_record import MachineRecord
from bridgeport.errors import BundleIntegrityError, DependencyError, EngineError, InputError, UnsupportedError
from bridgeport.runtime.backends import EngineOptions
from bridgeport.runtime.tensorrt import load_engines, loader, memory
from bridgeport.runtime.tensorrt.machine import find_machine

RUN_TRIAL = loader._run_trial
OPTIONS = EngineOptions()


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Doubles:
    return install_doubles(monkeypatch, tmp_path)


@pytest.fixture
def engines(doubles: Doubles, tmp_path: Path) -> Bundle:
    bundle = write_engines(write_bundle(tmp_path / "bundle"), tmp_path / "engines", doubles.api)
    doubles.tensorrt.calls.clear()
    return bundle


def load(bundle: Bundle) -> None:
    for engine in load_engines(bundle, OPTIONS).values():
        engine.close()


def nothing_ran(doubles: Doubles) -> bool:
    return not [name for name in doubles.tensorrt.names() if name.startswith(("Runtime.", "ICudaEngine."))]


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (
            {"gpu": "Orin", "compute_capability": "8.7"},
            r"GPU is Orin \(SM 8.7\), the engine was built for .*\(SM 8.9\)",
        ),
        ({"tensorrt": "11.4.1.2"}, "TensorRT is 11.4.1.2, the engine was built for 11.4.0.106"),
        ({"platform": "linux-aarch64"}, "platform is linux-aarch64"),
        ({"driver": "575.51.02"}, r"driver is 575.51.02, .*\(older than at the build"),
    ],
)
def test_another_machine(
    monkeypatch: pytest.MonkeyPatch, doubles: Doubles, engines: Bundle, machine: dict[str, str], why: str
) -> None:
    monkeypatch.setattr(loader, "find_machine", lambda *_, **__: MACHINE.model_copy(update=machine))
    with pytest.raises(EngineError, match=rf"encoder: {why}.*rebuild it here: bridgeport build .*engines"):
        load(engines)
    assert nothing_ran(doubles)


def test_the_last_stage_is_compared_before_the_first_is_loaded(doubles: Doubles, engines: Bundle) -> None:
    *others, llm = engines.manifest.stages
    assert llm.engine is not None
    elsewhere = llm.engine.model_copy(update={"machine": MACHINE.model_copy(update={"compute_capability": "7.5"})})
    stages = (*others, llm.model_copy(update={"engine": elsewhere}))
    with pytest.raises(EngineError, match="llm: GPU is"):
        load(Bundle(engines.path, engines.manifest.model_copy(update={"stages": stages})))
    assert nothing_ran(doubles)


def test_no_driver_and_no_gpu(monkeypatch: pytest.MonkeyPatch, doubles: Doubles, engines: Bundle) -> None:
    def no_driver(version: str, *, cuda_major: int | None) -> MachineRecord:
        return find_machine(version, cuda_major=cuda_major, library="libcuda-that-is-not-here.so.1")

    monkeypatch.setattr(loader, "find_machine", no_driver)
    with pytest.raises(DependencyError, match="there is no NVIDIA driver here"):
        load(engines)

    def no_gpu(*_: Any, **__: Any) -> MachineRecord:
        raise UnsupportedError("the NVIDIA driver sees no GPU; check CUDA_VISIBLE_DEVICES and `nvidia-smi`")

    monkeypatch.setattr(loader, "find_machine", no_gpu)
    with pytest.raises(UnsupportedError, match="sees no GPU"):
        load(engines)
    assert nothing_ran(doubles)


def test_no_cuda_python(monkeypatch: pytest.MonkeyPatch, doubles: Doubles, engines: Bundle) -> None:
    monkeypatch.setattr(memory, "_MODULES", ("cuda.not_here",))
    with pytest.raises(DependencyError, match=r"needs cuda-python .*pip install cuda-python"):
        load(engines)
    assert nothing_ran(doubles)


def test_the_older_module_of_cuda_python(monkeypatch: pytest.MonkeyPatch, doubles: Doubles, engines: Bundle) -> None:
    monkeypatch.setitem(sys.modules, "cuda.cudart", sys.modules["cuda.bindings.runtime"])
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    load(engines)
    assert doubles.cuda.left() == {}


def test_a_bundle_of_graphs(doubles: Doubles, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"encoder has no TensorRT engine; build one with `bridgeport build"):
        load(write_bundle(tmp_path / "graphs"))


@pytest.mark.parametrize("device", ["cuda:1", "gpu"])
def test_another_device(doubles: Doubles, engines: Bundle, device: str) -> None:
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES=N"):
        load_engines(engines, EngineOptions(device=device))


def test_a_plan_that_changed_after_the_check(doubles: Doubles, engines: Bundle) -> None:
    plan = engines.path / "encoder" / "model.plan"
    plan.write_bytes(plan.read_bytes() + b"\0")
    with pytest.raises(BundleIntegrityError, match=r"model.plan was changed since the bundle was verified"):
        load(engines)
    assert nothing_ran(doubles)


def test_what_is_loaded_twice_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, doubles: Doubles, engines: Bundle, tmp_path: Path
) -> None:
    tried: list[list[str]] = []
    monkeypatch.setattr(loader, "_run_trial", lambda arguments: tried.append(arguments))
    for _ in range(2):
        load(engines)
    assert len(tried) == 4
    newer = MACHINE.model_copy(update={"driver": "590.10"})
    monkeypatch.setattr(loader, "find_machine", lambda *_, **__: newer)
    load(engines)
    assert len(tried) == 8, "another driver, another trial"
    monkeypatch.setenv("BRIDGEPORT_CACHE", "/dev/null/cache")
    load(engines)
    assert len(tried) == 12, "a cache that cannot be written costs time alone"


def test_all_plans_are_tried_before_the_first_is_loaded(
    monkeypatch: pytest.MonkeyPatch, doubles: Doubles, engines: Bundle
) -> None:
    """On a Jetson child and parent share the memory: what the parent holds, the child lacks."""
    loaded: list[int] = []

    def count(_: list[str]) -> None:
        loaded.append(len(doubles.tensorrt.of("Runtime.deserialize_cuda_engine")))

    monkeypatch.setattr(loader, "_run_trial", count)
    load(engines)
    assert loaded == [0, 0, 0, 0]
    assert len(doubles.tensorrt.of("Runtime.deserialize_cuda_engine")) == 4


@pytest.mark.parametrize("limit", [256, 1024, 8192, 32768])
def test_what_was_made_is_given_back_when_memory_ends(doubles: Doubles, engines: Bundle, limit: int) -> None:
    doubles.cuda.limit = limit
    try:
        with pytest.raises(EngineError, match=r"the device has no .* MiB left"):
            load(engines)
    finally:
        assert doubles.cuda.left() == {}


def test_a_folder_that_is_called_tensorrt(
    monkeypatch: pytest.MonkeyPatch, doubles: Doubles, engines: Bundle, tmp_path: Path
) -> None:
    """Python takes any folder for a module; one of engines may stand in the working directory."""
    (tmp_path / "place" / "tensorrt").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(tmp_path / "place")
    with pytest.raises(DependencyError, match=r"Python finds \(.*place/tensorrt\) is not NVIDIA's; .*pip install"):
        load(engines)


def test_stripped_weights_come_from_the_graph(doubles: Doubles, tmp_path: Path) -> None:
    stripped = write_engines(write_bundle(tmp_path / "bundle"), tmp_path / "engines", doubles.api, strip=True)
    load(stripped)
    files = [call.arguments["model"] for call in doubles.tensorrt.of("OnnxParserRefitter.refit_from_file")]
    assert files == [str(stripped.graph(stage)) for stage in ("encoder", "connector", "embed_tokens", "llm")]


def test_the_lean_runtime_of_a_plan_needs_leave(doubles: Doubles, tmp_path: Path) -> None:
    source = write_bundle(tmp_path / "bundle")
    portable = write_engines(source, tmp_path / "engines", doubles.api, version_compatible=True)
    load(portable)
    told = [call.arguments["value"] for call in doubles.tensorrt.of("Runtime.engine_host_code_allowed=")]
    assert told == [True] * 4


def test_memory_is_given_back_when_a_later_stage_fails(doubles: Doubles, engines: Bundle) -> None:
    manifest = engines.manifest
    assert manifest.kv_cache is not None
    shared = manifest.model_copy(update={"kv_cache": manifest.kv_cache.model_copy(update={"shared_buffer": True})})
    with pytest.raises(EngineError, match="written in place, which no TensorRT engine does"):
        load(Bundle(engines.path, shared))
    assert doubles.cuda.left() == {}


@pytest.mark.slow  # starts Python four times
def test_plans_in_a_child(monkeypatch: pytest.MonkeyPatch, doubles: Doubles, engines: Bundle, tmp_path: Path) -> None:
    """The genuine child process: over the double, over one that crashes, and with a plan that is not one."""
    monkeypatch.setattr(loader, "_run_trial", RUN_TRIAL)
    monkeypatch.setenv("PYTHONPATH", str(write_module(tmp_path / "double", "11.4", sm="8.9")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (engines.path / "encoder" / "model.plan").write_bytes(b"not a plan at all")
    rehashed = Bundle(engines.path, write_manifest(engines.path, engines.manifest))
    with pytest.raises(EngineError, match=r"encoder does not load: .*magic tag does not match.*bridgeport build"):
        load(rehashed)
    assert nothing_ran(doubles)
    crash = tmp_path / "crash"
    crash.mkdir()
    (crash / "tensorrt.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(crash))
    with pytest.raises(EngineError, match=r"ended by SIGSEGV \(the plan is damaged, or the driver is\)"):
        load(rehashed)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "double"))
    plan = engines.path / "connector" / "model.plan"
    sha = next(one.sha256 for one in rehashed.manifest.files if one.path == "connector/model.plan")
    assert RUN_TRIAL([str(plan), sha, "plain"]) is None
    assert "was changed since" in str(RUN_TRIAL([str(plan), "0" * 64, "plain"]))


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("kill -9 $$", r"was killed \(the machine's memory is used up: end others, or narrow --profile\)"),
        (r"printf 'driver \377 broken\n' >&2; exit 3", "driver \ufffd broken"),
        ("exit 3", "ended with status 3"),
    ],
)
def test_how_a_child_may_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, why: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert re.search(why, str(RUN_TRIAL(["plan"])))


def test_a_child_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that ends the process with 0 before the plan was loaded has not loaded it."""
    monkeypatch.setattr(sys, "executable", "/bin/true")
    assert "ended with status 0" in str(RUN_TRIAL(["plan"]))
