"""What is asked of TensorRT for one engine, and how a build that fails or is stopped ends. Against the double."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.export.tensorrt.bundles import write_bundle
from tests.tensorrt.double import TensorRtDouble, install_double, write_module

from bridgeport.bundle import Bundle
from bridgeport.engine_record import BuildOptions
from bridgeport.errors import EngineError, ExportError, UnsupportedError
from bridgeport.export.tensorrt import child, worker
from bridgeport.export.tensorrt.child import run_child
from bridgeport.export.tensorrt.job import BuildEvent, StageJob
from bridgeport.export.tensorrt.profiles import bundle_profiles, stage_inputs
from bridgeport.export.tensorrt.worker import Reporter, build_stage


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("worker") / "bundle")


def make_job(bundle: Bundle, folder: Path, stage: str = "encoder", **changes: Any) -> StageJob:
    record = bundle.manifest.stage(stage)
    fields: dict[str, Any] = {
        "stage": stage,
        "graph": str(bundle.graph(stage)),
        "plan": str(folder / "model.plan"),
        "inputs": tuple(spec.name for spec in stage_inputs(record, bundle.manifest)),
        "profiles": tuple(one.model_dump() for one in bundle_profiles(bundle.manifest)[stage]),
        "options": BuildOptions().model_dump(),
    }
    return StageJob(**fields | changes)


def build(job: StageJob) -> tuple[Any, list[dict[str, Any]]]:
    """Built in this process; (result, events)."""
    answers = io.StringIO()
    result = build_stage(StageJob.from_line(job.to_line()), Reporter(answers))
    return result, [json.loads(line) for line in answers.getvalue().splitlines()]


@pytest.mark.parametrize("version", ["10.3", "10.16", "11.4"])
def test_the_calls_of_a_build(version: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double = install_double(monkeypatch, version)
    options = BuildOptions(optimization_level=2, workspace_mib=256, tactic_dram_mib=512, strip=True)
    job = make_job(bundle, tmp_path, "llm", options=options.model_dump())
    result, _ = build(job)
    strongly_typed = double.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert double.of("Builder.create_network")[0].arguments == {"flags": 1 << int(strongly_typed)}
    assert result.flags == ("REFIT_IDENTICAL", "STRIP_PLAN")  # by name, and no TF32
    assert _values(double, "IBuilderConfig.builder_optimization_level=") == [2]
    pools = {call.arguments["pool"].name: call.arguments["pool_size"] for call in _pools(double)}
    assert pools == {"WORKSPACE": 256 << 20, "TACTIC_DRAM": 512 << 20}
    assert len(double.of("IBuilderConfig.add_optimization_profile")) == 2  # prefill, decode
    names = double.names()
    assert names.index("OnnxParser.parse_from_file") < names.index("IBuilderConfig.add_optimization_profile")
    assert names.index("IBuilderConfig.add_optimization_profile") < names.index("Builder.build_serialized_network")
    assert (tmp_path / "model.plan").stat().st_size == result.size > 0


def _values(double: TensorRtDouble, name: str) -> list[Any]:
    return [call.arguments["value"] for call in double.of(name)]


def _pools(double: TensorRtDouble) -> list[Any]:
    return double.of("IBuilderConfig.set_memory_pool_limit")


def test_tf32_is_stated_and_can_be_allowed(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_double(monkeypatch)
    assert build(make_job(bundle, tmp_path))[0].flags == ()
    assert build(make_job(bundle, tmp_path, options=BuildOptions(tf32=True).model_dump()))[0].flags == ("TF32",)


def test_progress_is_reported_and_every_message_logged(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_double(monkeypatch, build_steps=5)
    _, events = build(make_job(bundle, tmp_path, log=str(tmp_path / "log")))
    phases = [(event["phase"], event["parent"], event["steps"]) for event in events if event["event"] == "phase"]
    assert phases == [("Building Engine", "", 5), ("Timing graph nodes", "Building Engine", 5)]
    assert [event["phase"] for event in events if event["event"] == "finish"] == [
        "Timing graph nodes",
        "Building Engine",
    ]
    assert (tmp_path / "log").read_text().startswith("== stage encoder: ")


def test_timings_are_shared_between_builds(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_double(monkeypatch)
    cache = tmp_path / "cache" / "timing.cache"
    build(make_job(bundle, tmp_path, timing_cache=str(cache)))
    first = cache.read_bytes()
    build(make_job(bundle, tmp_path, "connector", timing_cache=str(cache)))
    assert len(cache.read_bytes()) > len(first)  # merged, not replaced


def test_a_damaged_shared_cache_is_begun_anew_and_a_named_one_refused(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_double(monkeypatch)
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"damaged")
    with pytest.raises(EngineError, match=r"--timing-cache .*timing.cache: the timing cache cannot be read"):
        build(make_job(bundle, tmp_path, timing_cache=str(cache), strict_cache=True))
    assert cache.read_bytes() == b"damaged"
    _, events = build(make_job(bundle, tmp_path, timing_cache=str(cache)))
    assert [event["text"][:30] for event in events if event["event"] == "note"] == ["a new timing cache is begun: t"]
    assert cache.read_bytes() != b"damaged"


def test_a_graph_with_other_inputs_than_the_contract(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_double(monkeypatch)
    with pytest.raises(ExportError, match="the network has inputs pixel_values, the contract mask, pixel_values"):
        build(make_job(bundle, tmp_path, inputs=("pixel_values", "mask")))


def test_a_node_that_tensorrt_does_not_know_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    install_double(monkeypatch)
    other = write_bundle(tmp_path / "bundle")
    model = onnx.load(str(other.graph("connector")))
    model.graph.node[0].domain = "com.microsoft"
    onnx.save(model, str(other.graph("connector")))
    with pytest.raises(EngineError, match=r"MatMul 'project': No importer registered"):
        build(make_job(other, tmp_path, "connector"))


# The process


@pytest.fixture
def double_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write the double as a module for child processes, with knobs."""

    def write(**knobs: Any) -> None:
        folder = write_module(tmp_path / "double", **knobs)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))

    return write


def test_a_place_that_cannot_be_written_comes_as_an_os_error(
    bundle: Bundle, tmp_path: Path, double_module: Any
) -> None:
    double_module()
    with pytest.raises(FileNotFoundError):
        run_child(make_job(bundle, tmp_path / "none"), lambda _: None)


def test_a_child_builds_and_tells(bundle: Bundle, tmp_path: Path, double_module: Any) -> None:
    double_module(version="10.3")
    seen: list[BuildEvent] = []
    module = tmp_path / "double" / "tensorrt.py"
    module.write_text("import os\nos.write(1, b'a line of C++')\n" + module.read_text())  # not an answer
    result = run_child(make_job(bundle, tmp_path), seen.append)
    assert result.size == (tmp_path / "model.plan").stat().st_size
    assert [event.kind for event in seen][:2] == ["phase", "phase"]
    assert {event.stage for event in seen} == {"encoder"}


def test_out_of_memory_says_what_to_lower(bundle: Bundle, tmp_path: Path, double_module: Any) -> None:
    double_module(fail_build="Error Code 2: OutOfMemory (Requested size was 4294967296 bytes.)")
    with pytest.raises(EngineError, match=r"encoder: out of memory in the build .*--profile.*--workspace"):
        run_child(make_job(bundle, tmp_path), lambda _: None)
    assert not (tmp_path / "model.plan").exists()


def test_an_error_of_the_child_keeps_its_class(bundle: Bundle, tmp_path: Path, double_module: Any) -> None:
    double_module(fail_build="Error Code 10: Could not find any implementation for node project")
    with pytest.raises(EngineError, match="encoder: the engine was not built: Error Code 10: Could not find any impl"):
        run_child(make_job(bundle, tmp_path), lambda _: None)
    assert isinstance(
        child._error(make_job(bundle, tmp_path), {"kind": "UnsupportedError", "message": "x"}), UnsupportedError
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "was killed during its start, most likely because"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "ended by SIGSEGV during its start"),
        (
            "import os, sys; print('a library said so', file=sys.stderr); os._exit(3)",
            "with status 3 .*said so; build ag",
        ),
    ],
)
def test_a_child_that_dies_is_reported(
    code: str, said: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(code + "\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with pytest.raises(EngineError, match=said):
        run_child(make_job(bundle, tmp_path), lambda _: None)


def test_ctrl_c_stops_the_build_at_its_next_step(bundle: Bundle, tmp_path: Path, double_module: Any) -> None:
    double_module(build_steps=50_000_000)  # hours, unless it is stopped

    def interrupt(event: BuildEvent) -> None:
        if event.kind == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child(make_job(bundle, tmp_path), interrupt)
    assert not (tmp_path / "model.plan").exists()


def test_a_child_whose_parent_is_gone_removes_the_staging_directory(
    bundle: Bundle, tmp_path: Path, double_module: Any
) -> None:
    import subprocess

    double_module(build_steps=50_000_000)
    staging = tmp_path / ".out.x.partial"
    staging.mkdir()
    job = make_job(bundle, staging, staging=str(staging))
    command = [sys.executable, "-m", worker.__name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdin is not None
        assert started.stdout is not None
        started.stdin.write(job.to_line())
        started.stdin.flush()
        assert json.loads(started.stdout.readline())["event"] == "phase"
        started.stdin.close()  # as the system does for a parent that was killed
        started.stdout.read()
    assert not staging.exists()


def test_only_a_staging_directory_is_removed(bundle: Bundle, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    worker._remove_staging(make_job(bundle, tmp_path, staging=str(kept)))
    assert kept.is_dir()
