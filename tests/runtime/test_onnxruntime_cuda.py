"""The CUDA path of the ONNX Runtime engine without a GPU.

What runs here is a double: device memory is host memory, and sessions that are asked for the CUDA provider compute on
the CPU when the stream has caught up. It shows that tensors are bound, copied and captured as meant and that the chain
gives the same text; nothing about a GPU. tests/runtime/test_cuda.py is for one.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.runtime.generation import pictures
from tests.tensorrt.cuda_double import CudaDouble, install_cuda_double

from bridgeport.bundle import Bundle
from bridgeport.errors import DependencyError, EngineError
from bridgeport.runtime import Pipeline
from bridgeport.runtime import onnxruntime as backend
from bridgeport.runtime.backends import EngineOptions, load_engines
from bridgeport.runtime.onnxruntime import cuda as cuda_path
from bridgeport.runtime.onnxruntime.cuda import CudaEngine
from bridgeport.runtime.onnxruntime.loader import Device
from bridgeport.runtime.tensorrt.device import Device as SharedDevice

GetPath = Callable[[str], Path]
PROMPT = "Question: what colour is the triangle? Answer:"


class BindingDouble:
    """An IO binding whose device "cuda" is host memory."""

    def __init__(self, binding: Any) -> None:
        self.genuine = binding
        self.tensors: dict[str, tuple[tuple[int, ...], int]] = {}

    def bind_input(self, name: str, place: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        assert (place, index) == ("cuda", 0)
        self.tensors[name] = (tuple(shape), address)
        self.genuine.bind_input(name, "cpu", 0, dtype, shape, address)

    def bind_output(self, name: str, place: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        assert (place, index) == ("cuda", 0)
        self.tensors[name] = (tuple(shape), address)
        self.genuine.bind_output(name, "cpu", 0, dtype, shape, address)


class SessionDouble:
    """A session of the CPU provider that runs when what is before it on the stream has run, and that refuses a captured
    graph at other shapes or addresses: ONNX Runtime would replay it over the old ones.
    """

    def __init__(self, session: Any, state: CudaDouble, options: dict[str, str]) -> None:
        self._session, self._state, self.options = session, state, options
        self.graphs: list[str | None] = []
        self._captured: dict[str, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def io_binding(self) -> BindingDouble:
        return BindingDouble(self._session.io_binding())

    def run_with_iobinding(self, binding: BindingDouble, options: Any = None) -> None:
        graph = None if options is None else options.get_run_config_entry("gpu_graph_id")
        self.graphs.append(graph)
        if graph not in (None, "-1"):
            assert self._captured.setdefault(graph, dict(binding.tensors)) == binding.tensors
        self._state.run()
        self._session.run_with_iobinding(binding.genuine)


@pytest.fixture(scope="module")
def bundle(blip2_bundle: GetPath) -> Bundle:
    return Bundle.load(blip2_bundle("llama-gqa-tied"))


@pytest.fixture
def sessions(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> dict[str, SessionDouble]:
    """Sessions by stage, as they are loaded for the CUDA provider."""
    state = install_cuda_double(monkeypatch)
    names = {bundle.graph(stage.contract.name): stage.contract.name for stage in bundle.manifest.stages}
    genuine, made = backend.load_session, dict[str, SessionDouble]()

    def load_double(file: Path, device: Device, *, providers: Any = None, **settings: Any) -> SessionDouble:
        assert device == Device("cuda")
        (name, options), host = providers
        assert (name, host) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        made[names[file]] = SessionDouble(genuine(file, Device(), **settings), state, options)
        return made[names[file]]

    monkeypatch.setattr(backend, "load_session", load_double)
    return made


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, threads=1) as loaded:
        yield loaded


def load(bundle: Bundle, *, graphs: bool = False) -> Pipeline:
    options = EngineOptions("cuda", 1, cuda_graphs=graphs)
    return Pipeline(bundle, load_engines("onnxruntime", bundle, options), options)


@pytest.mark.parametrize("graphs", [False, True])
def test_the_chain_gives_the_same_tokens(
    graphs: bool, bundle: Bundle, expected: Pipeline, sessions: dict[str, SessionDouble]
) -> None:
    images, prompts = pictures(), ["a photo of", PROMPT, ""]
    with load(bundle, graphs=graphs) as pipeline:
        assert pipeline.resident
        for _ in range(2):  # the second time over the memory and the graphs of the first
            found = pipeline.generate(images, prompts, max_new_tokens=6)
            wanted = expected.generate(images, prompts, max_new_tokens=6)
            assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert all(isinstance(engine, CudaEngine) for engine in pipeline.engines.values())


def test_features_do_not_touch_the_host(
    bundle: Bundle, sessions: dict[str, SessionDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[tuple[str, int]] = []
    genuine = SharedDevice.upload
    with load(bundle) as pipeline:
        memory = pipeline.engines["encoder"].memory
        copy = memory.cuda.copy  # type: ignore[union-attr]

        def record(target: int, source: int, size: int, way: str, stream: int) -> None:
            copied.append((way, size))
            copy(target, source, size, way, stream)

        monkeypatch.setattr(memory.cuda, "copy", record)  # type: ignore[union-attr]
        monkeypatch.setattr(SharedDevice, "upload", lambda *_: pytest.fail("an upload of features"))
        prepared = pipeline.prepare(pictures(1), PROMPT)
        picture = prepared.pictures[0][0]
        embeds = pipeline.vision.encode([picture], resident=True)
        features = [pipeline.vision.arrange(picture, pipeline.vision.connect([picture], embeds, resident=True)[0])]
        merged, _ = pipeline.merge(prepared, features)
        assert not isinstance(merged, np.ndarray)
        host = [(way, size) for way, size in copied if way != "DeviceToDevice"]
        assert host == [
            ("HostToDevice", picture.tensors["pixel_values"].nbytes),
            ("HostToDevice", prepared.input_ids[0].nbytes),
        ]
        monkeypatch.setattr(SharedDevice, "upload", genuine)


def test_steps_are_captured_and_prompts_are_not(bundle: Bundle, sessions: dict[str, SessionDouble]) -> None:
    with load(bundle, graphs=True) as pipeline:
        for _ in range(2):
            pipeline.generate(pictures(1)[0], "a photo of", max_new_tokens=5, ignore_eos=True)
    llm = sessions["llm"]
    # Prefill, the first step as it is, then the graph; the second generation is over the same cache and shapes.
    assert llm.graphs == ["-1", "-1", "1", "1", "1"] * 2
    assert llm.options["enable_cuda_graph"] == sessions["embed_tokens"].options["enable_cuda_graph"] == "1"
    assert "enable_cuda_graph" not in sessions["encoder"].options
    streams = {session.options["user_compute_stream"] for session in sessions.values()}
    assert len(streams) == 1
    assert sessions["encoder"].graphs == [None, None]


def test_graphs_have_a_limit(
    bundle: Bundle, sessions: dict[str, SessionDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_path, "MOST_GRAPHS", 1)
    with load(bundle, graphs=True) as pipeline:
        pipeline.generate(pictures(1)[0], "a photo of", max_new_tokens=3, ignore_eos=True)
        pipeline.generate(pictures(2), "a photo of", max_new_tokens=3, ignore_eos=True)
    assert sessions["llm"].graphs == ["-1", "-1", "1", "-1", "-1", "-1"]


def test_a_session_that_cannot_be_captured_says_what_to_do(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install_cuda_double(monkeypatch)

    def refuse(file: Path, *_: Any, **__: Any) -> Any:
        raise EngineError(f"{file} does not load: nodes are not on CUDA; export the bundle again")

    monkeypatch.setattr(backend, "load_session", refuse)
    with pytest.raises(EngineError, match="or load it without cuda_graphs"):
        backend._load_engine(
            bundle, "llm", EngineOptions("cuda", cuda_graphs=True), cuda_path.shared_device(Device("cuda"))
        )


def test_what_was_made_is_given_back_when_a_stage_does_not_load(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = install_cuda_double(monkeypatch)

    def refuse(file: Path, *_: Any, **__: Any) -> Any:
        raise DependencyError("CUDAExecutionProvider did not start")

    monkeypatch.setattr(backend, "load_session", refuse)
    with pytest.raises(DependencyError, match="did not start"):
        load(bundle)
    assert state.calls.count("cudaStreamCreateWithFlags") == 1
    assert state.left() == {}


def test_a_call_of_a_closed_engine(bundle: Bundle, sessions: dict[str, SessionDouble]) -> None:
    with load(bundle) as pipeline:
        engine = pipeline.engines["encoder"]
        spec = engine.contract.outputs[0]
        shape = tuple(2 if isinstance(dim, str) else dim for dim in spec.shape)
        pixels = np.zeros((2, 3, 28, 28), np.float32)
        call = engine.bind({"pixel_values": pixels}, {spec.name: np.zeros(shape, np.float32)})
    state = sessions["encoder"]._state
    state.calls.clear()
    with pytest.raises(EngineError, match="encoder: the engine is closed"):
        call()
    assert state.calls == []


def test_memory_is_given_back(
    bundle: Bundle, sessions: dict[str, SessionDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(bundle, graphs=True) as pipeline:
        pipeline.generate(pictures(1)[0], "a photo of", max_new_tokens=4)
        engine = pipeline.engines["encoder"]
        state = sessions["llm"]._state
        assert state.used() > 0
    with pytest.raises(EngineError, match="encoder: the engine is closed"):
        engine.run({"pixel_values": np.zeros((1, 3, 28, 28), np.float32)})
    del pipeline, engine
    gc.collect()
    assert state.used() == 0


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_where_tensors_pass_through_the_host(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install_cuda_double(monkeypatch)
    assert cuda_path.shared_device(Device.parse(device)) is None


def test_where_cuda_does_not_start(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """cuda-python is there and no driver: the session says what is missing, and how to get it."""
    install_cuda_double(monkeypatch, broken=True)
    assert cuda_path.shared_device(Device("cuda")) is None

    def refuse(*_: Any) -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")  # what cuda-python 12.3 does

    monkeypatch.setattr(sys.modules["cuda.bindings.runtime"], "cudaStreamCreateWithFlags", refuse)
    with caplog.at_level("INFO"):
        assert cuda_path.shared_device(Device("cuda")) is None
    assert "CUDA: cudaStreamCreateWithFlags failed (Failed to dlopen libcuda.so.1)" in caplog.text


def test_without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cuda_path.shared_device(Device("cuda")) is None


def test_the_cpu_path_knows_nothing_of_it(bundle: Bundle) -> None:
    engines = load_engines("onnxruntime", bundle, EngineOptions(threads=1))
    assert {type(engine).__name__ for engine in engines.values()} == {"OnnxRuntimeEngine"}
    assert all(engine.memory is None for engine in engines.values())
