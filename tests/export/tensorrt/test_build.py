"""A bundle to a bundle of engines: checked before anything, built whole, or not there at all. Against the double."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests.export.tensorrt.bundles import MACHINE, write_bundle
from tests.tensorrt.double import install_double, write_module
from tests.tensorrt.double_plan import Plan

from bridgeport.bundle import Bundle
from bridgeport.engine_record import BuildOptions, check_engine
from bridgeport.errors import CheckFailed, DependencyError, EngineError, InputError, OutputError, UnsupportedError
from bridgeport.export.tensorrt import build
from bridgeport.export.tensorrt.build import BuildRun, build_bundle, find_build_machine
from bridgeport.export.tensorrt.devices import check_device, find_device, with_device_limits
from bridgeport.export.tensorrt.job import BuildEvent
from bridgeport.export.tensorrt.worker import Reporter, build_stage

RUN = BuildRun(skip_preflight=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("build") / "bundle")


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make this machine a Jetson with the double as its TensorRT; stages are built in this process."""

    def make(**knobs: Any) -> None:
        install_double(monkeypatch, "10.3", **knobs)
        monkeypatch.setenv("BRIDGEPORT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(build, "find_build_machine", lambda: MACHINE)
        monkeypatch.setattr(build, "run_child", lambda job, _: build_stage(job, Reporter(io.StringIO())))

    return make


def test_every_stage_gets_an_engine_and_a_record(bundle: Bundle, board: Callable[..., None], tmp_path: Path) -> None:
    board()
    seen: list[BuildEvent] = []
    out = tmp_path / "engines"
    options = BuildOptions(strip=True)
    build_bundle(bundle.path, out, profiles=["batch=1,1,4"], options=options, run=RUN, progress=seen.append)
    built = Bundle.load(out)
    assert [event.stage for event in seen if event.kind == "stage"] == ["encoder", "connector", "embed_tokens", "llm"]
    for stage in built.manifest.stages:
        assert stage.format == "tensorrt"
        assert stage.engine is not None
        assert stage.engine.flags == ("REFIT_IDENTICAL", "STRIP_PLAN")
        assert check_engine(stage.engine, MACHINE) == []
        assert stage.contract.axis("batch").max == 4  # what the engine takes, not what the graph would
        header = Plan.from_bytes(built.file(stage.engine.file).read_bytes()).header
        assert header["strongly_typed"] is True
        hashes = {file.path: file.sha256 for file in bundle.manifest.files}
        assert stage.engine.sources == {path: hashes[path] for path in stage.engine.sources}
    encoder = built.manifest.stage("encoder").engine
    assert encoder is not None
    assert set(encoder.sources) == {"encoder/model.onnx", "encoder/model.onnx.data"}
    assert encoder.options.workspace_mib == 2048  # of a board with 16 GB
    assert encoder.rebuild_command("b") == "bridgeport build b -o NEW --profile batch=1,1,4 --strip"
    assert list((tmp_path / "cache" / "tensorrt").glob("*.cache"))


def test_a_bundle_of_engines_is_built_anew(bundle: Bundle, board: Callable[..., None], tmp_path: Path) -> None:
    """As on another machine: old plans go, the profiles stay inside of the first ones."""
    board()
    build_bundle(bundle.path, tmp_path / "first", profiles=["batch=1,1,4"], run=RUN)
    build_bundle(tmp_path / "first", tmp_path / "second", profiles=["batch=2"], run=RUN)
    encoder = Bundle.load(tmp_path / "second").manifest.stage("encoder")
    assert encoder.engine is not None
    assert encoder.engine.profiles[0].axes == {"batch": (2, 2, 2)}
    with pytest.raises(InputError, match="exported for, 1 to 4"):
        build_bundle(tmp_path / "first", tmp_path / "third", profiles=["batch=8"], run=RUN)


def test_preflight_comes_first_and_its_errors_stop_the_build(
    bundle: Bundle, board: Callable[..., None], tmp_path: Path
) -> None:
    """On 8 GB less than the graphs and batches need nothing is built; `--skip-preflight` builds all the same."""
    from bridgeport.export.preflight.findings import Finding

    board()
    asked: list[Any] = []

    class Report:
        findings = (Finding("memory", "error", "llm", "decoder.onnx", "it needs 20 GB", "lower the batch"),)

    def preflight(*_: object, **options: Any) -> Report:
        asked.append((options["tensorrt"], options["device"].name, options["profiles"]))
        return Report()

    module = ModuleType("run")
    module.__dict__.update(preflight=preflight, parse_version=lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "bridgeport.export.preflight.run", module)
        with pytest.raises(CheckFailed, match=r"1 error in llm, decoder.onnx: it needs 20 GB; lower the batch"):
            build_bundle(bundle.path, tmp_path / "engines", profiles=["batch=1"])
    assert asked == [("10.3.0.30", "orin-nx", ["batch=1"])]
    assert not (tmp_path / "engines").exists()


def test_a_build_sets_what_preflight_recommends(bundle: Bundle, board: Callable[..., None], tmp_path: Path) -> None:
    """Where the weights leave less than the board's own limits; what was asked for stays."""
    board()
    settings = SimpleNamespace(workspace_mib=512, tactic_dram_mib=256, builder_optimization_level=1)

    class Report:
        findings = ()
        memory = SimpleNamespace(settings=settings)

        def count(self, _: str) -> int:
            return 0

    module = ModuleType("run")
    module.__dict__.update(preflight=lambda *_, **__: Report(), parse_version=lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "bridgeport.export.preflight.run", module)
        built = build_bundle(bundle.path, tmp_path / "engines", options=BuildOptions(workspace_mib=700))
    for stage in built.manifest.stages:
        assert stage.engine is not None
        options = stage.engine.options
        assert (options.workspace_mib, options.tactic_dram_mib, options.optimization_level) == (700, 256, 1)
        assert stage.engine.requested == ("--workspace", "700")


def test_a_failed_build_leaves_nothing(bundle: Bundle, board: Callable[..., None], tmp_path: Path) -> None:
    board(fail_build="Error Code 10: no implementation")
    with pytest.raises(EngineError, match="the engine was not built: Error Code 10"):
        build_bundle(bundle.path, tmp_path / "a" / "engines", run=RUN)
    assert list((tmp_path / "a").iterdir()) == []


def test_the_second_of_two_builds_into_one_place_is_refused(
    bundle: Bundle, board: Callable[..., None], tmp_path: Path
) -> None:
    """It passed the first check, waited for the device, and then finds what the other one wrote."""
    board()
    out = tmp_path / "engines"

    class Taken:
        def __enter__(self) -> None:
            out.mkdir()
            (out / "manifest.json").write_text("{}")

        def __exit__(self, *_: object) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "device_lock", lambda *_: Taken())
        with pytest.raises(OutputError, match="is a bundle already"):
            build_bundle(bundle.path, out, run=RUN)


@pytest.mark.slow
def test_every_stage_is_built_in_a_process_of_its_own(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_module(tmp_path / "double", version="10.3")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
    monkeypatch.setenv("BRIDGEPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "find_build_machine", lambda: MACHINE)
    build_bundle(bundle.path, tmp_path / "engines", run=RUN)
    assert all(stage.engine is not None for stage in Bundle.load(tmp_path / "engines").manifest.stages)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"device": "orin"}, InputError, "--device 'orin' is unknown; accepted are local, orin-nano"),
        ({"device": "l4"}, UnsupportedError, "here is Orin .SM 8.7, 16.0 GB.; engines are built on the device"),
        ({"profiles": ["batch=9"]}, InputError, "outside of what stage encoder was exported for"),
        ({"run": BuildRun(log=Path("/dev/null/log"))}, OutputError, "/dev/null"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything(
    arguments: Any, error: type[Exception], said: str, bundle: Bundle, board: Callable[..., None], tmp_path: Path
) -> None:
    board()
    with pytest.raises(error, match=said):
        build_bundle(bundle.path, tmp_path / "engines", **{"run": RUN, **arguments})


@pytest.mark.parametrize("change", [{"domain": "com.microsoft", "target": "cpu"}])
def test_a_bundle_for_onnx_runtime_is_refused_with_the_command(change: Any, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "bundle", **change)
    with pytest.raises(UnsupportedError) as refused:
        build_bundle(other.path, tmp_path / "engines")
    assert "stage llm: the graph has operators of com.microsoft" in str(refused.value)
    assert "bridgeport quantize" in str(refused.value)
    assert "--target tensorrt" in str(refused.value)


def test_an_option_that_this_tensorrt_lacks_is_refused_before_preflight(
    bundle: Bundle, board: Callable[..., None], tmp_path: Path
) -> None:
    board()
    seen: list[BuildEvent] = []
    options = BuildOptions(hardware_compatibility="SAME_COMPUTE_CAPABILITY")
    with pytest.raises(InputError, match=r"'SAME_COMPUTE_CAPABILITY' needs TensorRT 10\.9; TensorRT 10\.3"):
        build_bundle(bundle.path, tmp_path / "engines", options=options, progress=seen.append)
    assert seen == []


def test_without_tensorrt(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DependencyError, match=r"TensorRT's Python module .* JetPack .*pip install tensorrt"):
        build_bundle(bundle.path, tmp_path / "engines")


def test_without_a_driver(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a driver")
    install_double(monkeypatch, "11.4")
    with pytest.raises(DependencyError, match="there is no NVIDIA driver here"):
        find_build_machine()
    with pytest.raises(DependencyError):
        build_bundle(bundle.path, tmp_path / "engines")
    assert list(tmp_path.iterdir()) == []


def test_devices_and_their_limits() -> None:
    assert find_device("local") is None
    check_device("orin-nx", MACHINE)
    check_device("local", MACHINE)
    with pytest.raises(
        UnsupportedError, match=r"is Jetson Orin Nano 8 GB .SM 8.7, 8 GB., here is Orin .SM 8.7, 16.0 GB"
    ):
        check_device("orin-nano", MACHINE)
    given = with_device_limits(BuildOptions(workspace_mib=77), "orin-nano")
    assert (given.workspace_mib, given.tactic_dram_mib, given.optimization_level) == (77, 2048, 2)
    small = MACHINE.model_copy(update={"memory": 7620 << 20})
    check_device("orin-nano", small)
    assert with_device_limits(BuildOptions(optimization_level=5), "local", small) == BuildOptions(
        optimization_level=5, workspace_mib=1024, tactic_dram_mib=2048
    )
    card = {"l4t": None, "compute_capability": "8.9", "gpu": "NVIDIA L4", "memory": 22_600 << 20}
    check_device("l4", MACHINE.model_copy(update=card))
    assert with_device_limits(BuildOptions(), "local", MACHINE.model_copy(update=card)) == BuildOptions(
        optimization_level=3
    )
    with pytest.raises(UnsupportedError):
        check_device("l4", MACHINE)
