"""The build side of the adapter over the double: settings, progress, caches, and what must be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper
from tests.tensorrt.double import install_double
from tests.tensorrt.listing import VERSIONS
from tests.tensorrt.small_model import build, write_model, write_small_model

from bridgeport.errors import EngineError, InputError
from bridgeport.runtime.tensorrt.api import BuildProgress, MessageLog, load_api


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_small_model(tmp_path)


def test_operators_without_an_importer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("BiasGelu", ["a", "b"], ["y"], "fused", domain="com.microsoft"),
    ]
    path = write_model(tmp_path / "m.onnx", nodes)
    install_double(monkeypatch)
    api = load_api()
    parser = api.create_parser(api.create_strongly_typed_network(api.create_builder()))
    assert api.unsupported_nodes(parser, path) == [1]
    with pytest.raises(EngineError, match=r"m\.onnx is not taken by TensorRT 11\.4.*BiasGelu 'fused'.*UNSUPPORTED"):
        api.parse_onnx(parser, path)


def test_bytes_need_a_path_for_external_data(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    outside = model.with_name("outside.onnx")
    onnx.save(onnx.load(model), outside, save_as_external_data=True, size_threshold=0, location="weights")
    install_double(monkeypatch)
    api = load_api()

    def parse(data: bytes, path: Path | None = None) -> None:
        api.parse_onnx_bytes(api.create_parser(api.create_strongly_typed_network(api.create_builder())), data, path)

    with pytest.raises(EngineError, match=r"the model is not taken .* no path was given"):
        parse(outside.read_bytes())
    with pytest.raises(EngineError, match="Failed to parse the ONNX model"):
        parse(b"\x08")
    parse(outside.read_bytes(), outside)


@pytest.mark.parametrize(
    ("profiles", "why"),
    [
        ((), "no optimization profile has been defined"),
        (({"z": ((1, 3),) * 3},), "no shapes for the dynamic input x"),
        (({"x": ((1, 4),) * 3},), "do not match network dimensions"),
        (({"x": ((2, 3), (1, 3), (4, 3))},), r"min \[2, 3\], opt \[1, 3\], max \[4, 3\]"),
    ],
)
def test_profiles_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, model: Path, profiles: Any, why: str) -> None:
    install_double(monkeypatch)
    with pytest.raises(EngineError, match=why):
        build(load_api(), model, profiles=profiles)


def test_flags_by_name(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    install_double(monkeypatch, "10.3")
    api = load_api()
    config = api.create_config(api.create_builder())
    assert api.flag_names(config) == ["TF32"]  # TensorRT's default
    api.set_tf32(config, False)
    api.set_flags(config, ["STRIP_PLAN", "REFIT_IDENTICAL"])
    assert api.flag_names(config) == ["REFIT_IDENTICAL", "STRIP_PLAN"]
    with pytest.raises(InputError, match=r"'STRICT_NANS' needs TensorRT 10\.16; TensorRT 10\.3.* takes DEBUG"):
        api.set_flags(config, ["STRICT_NANS"])
    with pytest.raises(InputError, match="'FP16' is not one"):
        api.set_flags(config, ["FP16"])
    with pytest.raises(InputError, match=r"needs TensorRT 10\.9"):
        api.set_hardware_compatibility(config, "SAME_COMPUTE_CAPABILITY")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_setting_of_a_build(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    double = install_double(monkeypatch, version)
    api = load_api()
    config = api.create_config(api.create_builder(max_threads=2))
    api.set_memory_limits(config, {"WORKSPACE": 1 << 30, "TACTIC_DRAM": 1 << 29, "TACTIC_SHARED_MEMORY": 1 << 16})
    api.set_effort(config, optimization_level=2, avg_timing_iterations=4, max_aux_streams=1)
    api.set_hardware_compatibility(config, "AMPERE_PLUS")
    api.set_profiling_verbosity(config, "DETAILED")
    api.set_runtime_platform(config, "SAME_AS_BUILD")
    if api.has("RUNTIME_ACTIVATION_RESIZE"):
        api.set_preview_feature(config, "RUNTIME_ACTIVATION_RESIZE_10_10", True)
    assert api.memory_limit(config, "WORKSPACE") == 1 << 30
    values = {call.name: call.arguments["value"] for call in double.calls if call.name.endswith("=")}
    assert values["IBuilderConfig.builder_optimization_level="] == 2
    assert values["IBuilderConfig.profiling_verbosity="].name == "DETAILED"
    with pytest.raises(InputError, match="MemoryPoolType 'DRAM' is not one"):
        api.set_memory_limits(config, {"DRAM": 1})


def test_progress_and_how_it_is_stopped(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    class Progress(BuildProgress):
        def __init__(self) -> None:
            self.seen: list[object] = []

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.seen.append((phase, parent, steps))

        def step_complete(self, phase: str, step: int) -> bool:
            self.seen.append(step)
            return True

        def phase_finish(self, phase: str) -> None:
            self.seen.append(phase)

    class Impatient(BuildProgress):
        def step_complete(self, phase: str, step: int) -> bool:
            raise KeyboardInterrupt

    class Enough(BuildProgress):
        def step_complete(self, phase: str, step: int) -> bool:
            return False

    install_double(monkeypatch)
    progress = Progress()
    build(load_api(), model, progress=progress)
    phases = [("Building Engine", None, 4), ("Timing graph nodes", "Building Engine", 4)]
    assert progress.seen == [*phases, 0, 1, 2, 3, "Timing graph nodes", "Building Engine"]
    with pytest.raises(KeyboardInterrupt):
        build(load_api(), model, progress=Impatient())
    with pytest.raises(EngineError, match="stopped by the progress monitor"):
        build(load_api(), model, progress=Enough())


def test_timing_caches(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    double = install_double(monkeypatch)
    api = load_api()
    config = api.create_config(api.create_builder())
    api.load_timing_cache(config)
    empty = api.timing_cache_bytes(config)
    with pytest.raises(EngineError, match="verification header"):
        api.load_timing_cache(config, b"garbage")
    with pytest.raises(EngineError, match="cannot be merged"):
        api.combine_timing_caches(config, [empty, b"garbage"])
    assert api.combine_timing_caches(config, [empty, empty]) == empty
    double.sm = "9.0"
    with pytest.raises(EngineError, match="another device"):
        api.load_timing_cache(config, empty)


def test_what_tensorrt_says_comes_out(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    double = install_double(monkeypatch, fail_build="Error Code 2: OutOfMemory (Requested size was 9 bytes)")
    refused = pytest.raises(EngineError, match=r"OutOfMemory \(Requested size was 9")
    with (tmp_path / "log").open("w") as stream, refused:
        build(load_api(MessageLog.to_stream(stream)), model)
    assert (tmp_path / "log").read_text() == "[error] Error Code 2: OutOfMemory (Requested size was 9 bytes)\n"
    double.no_device = True
    with pytest.raises(EngineError, match="no builder: CUDA initialization failure"):
        load_api().create_builder()
    with pytest.raises(EngineError, match="no runtime: CUDA initialization failure"):
        load_api().create_runtime()
