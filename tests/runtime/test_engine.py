"""Engines: what their contract does not allow is refused by name, and the backend's own failures come wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridgeport.bundle import Bundle
from bridgeport.errors import DependencyError, EngineError, InputError
from bridgeport.runtime.backends import EngineOptions
from bridgeport.runtime.engine import Engine
from bridgeport.runtime.onnxruntime import Device, OnnxRuntimeEngine, load_engines, load_session
from bridgeport.runtime.onnxruntime import loader as onnxruntime_loader

GetPath = Callable[[str], Path]
CPU = Device()


@pytest.fixture(scope="module")
def bundle(blip2_bundle: GetPath) -> Bundle:
    return Bundle.load(blip2_bundle("llama-gqa-tied"))


@pytest.fixture(scope="module")
def engines(bundle: Bundle) -> Iterator[dict[str, Engine]]:
    yield (loaded := load_engines(bundle, EngineOptions(threads=1)))
    for engine in loaded.values():
        engine.close()


def pixels(batch: int = 2, **other: Any) -> Any:
    return np.zeros((batch, 3, 28, 28), **{"dtype": np.float32, **other})


def llm_inputs(batch: int, length: int, total: int) -> dict[str, Any]:
    return {
        "inputs_embeds": np.zeros((batch, length, 64), np.float32),
        "attention_mask": np.ones((batch, total), np.int64),
        "logits_position": np.zeros(batch, np.int64),
    }


def test_run_gives_the_outputs_of_the_contract(engines: dict[str, Engine]) -> None:
    outputs = engines["encoder"].run({"pixel_values": pixels(3)})
    assert {name: (array.shape, array.dtype) for name, array in outputs.items()} == {
        "image_embeds": ((3, 5, 32), np.dtype(np.float32))
    }


@pytest.mark.parametrize(
    ("stage", "inputs", "message"),
    [
        ("encoder", {}, "encoder: input 'pixel_values' is missing"),
        ("encoder", {"pixels": pixels()}, "encoder: there is no input 'pixels'; it takes pixel_values"),
        ("encoder", {"pixel_values": pixels()[0]}, r"pixel_values is \[3, 28, 28\], accepted is \['batch', 3"),
        ("encoder", {"pixel_values": np.zeros((1, 3, 28, 29), np.float32)}, r"is \[1, 3, 28, 29\], accepted is"),
        ("encoder", {"pixel_values": pixels(65)}, "axis 'batch' of pixel_values is 65, accepted is 1 to 64"),
        ("encoder", {"pixel_values": pixels(0)}, "axis 'batch' of pixel_values is 0, accepted is 1 to 64"),
        ("encoder", {"pixel_values": pixels(dtype=np.float64)}, "pixel_values is float64, accepted is float32"),
        ("encoder", {"pixel_values": pixels(order="F")}, "pixel_values is not C-contiguous"),
        ("llm", llm_inputs(2, 3, 129), "axis 'total_sequence' of attention_mask is 129, accepted is 1 to 128"),
        ("llm", llm_inputs(2, 3, 3) | {"logits_position": np.zeros(3, np.int64)}, "axis 'batch' is 3 in logits_pos"),
    ],
)  # fmt: skip
def test_what_the_contract_does_not_allow(
    engines: dict[str, Engine], stage: str, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        engines[stage].run(inputs)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({}, "output 'image_embeds' has no array"),
        ({"image_embeds": np.zeros((1, 5, 32), np.float32)}, r"image_embeds is \[1, 5, 32\], it must be \[2, 5, 32\]"),
        ({"image_embeds": np.zeros((2, 5, 32), np.float64)}, "image_embeds is float64, accepted is float32"),
    ],
)
def test_outputs_that_do_not_fit(engines: dict[str, Engine], outputs: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engines["encoder"].bind({"pixel_values": pixels()}, outputs)


def test_a_cache_must_be_there_and_hold_the_rows(engines: dict[str, Engine]) -> None:
    inputs, outputs = llm_inputs(2, 1, 9), {"logits": np.zeros((2, 324), np.float32)}
    with pytest.raises(EngineError, match="llm: bind needs a cache"):
        engines["llm"].bind(inputs, outputs)
    for batch, capacity in ((1, 9), (2, 8)):
        cache = engines["llm"].allocate_cache(batch, capacity)
        with pytest.raises(EngineError, match=f"2 rows of 9 tokens came, but the cache holds {batch} of {capacity}"):
            engines["llm"].bind(inputs, outputs, cache=cache)
    with pytest.raises(EngineError, match="encoder: this stage has no key/value cache"):
        engines["encoder"].allocate_cache(1, 8)


def test_bound_calls_read_what_the_arrays_hold_then(engines: dict[str, Engine]) -> None:
    inputs, outputs = {"pixel_values": pixels()}, {"image_embeds": np.zeros((2, 5, 32), np.float32)}
    call = engines["encoder"].bind(inputs, outputs)
    call()
    first = outputs["image_embeds"].copy()
    inputs["pixel_values"][1] = 1.0
    call()
    assert np.array_equal(outputs["image_embeds"][0], first[0])
    assert not np.allclose(outputs["image_embeds"][1], first[1])
    assert np.array_equal(engines["encoder"].run(inputs)["image_embeds"], outputs["image_embeds"])


def test_a_bound_call_keeps_its_arrays_alive(engines: dict[str, Engine]) -> None:
    outputs = {"image_embeds": np.zeros((2, 5, 32), np.float32)}
    call = engines["encoder"].bind({"pixel_values": pixels() + 0.5}, outputs)
    rubbish = [pixels() + 9 for _ in range(50)]
    call()
    expected = engines["encoder"].run({"pixel_values": pixels() + 0.5})["image_embeds"]
    assert np.array_equal(outputs["image_embeds"], expected)
    del rubbish


def test_a_graph_of_another_stage_is_refused(bundle: Bundle) -> None:
    session = load_session(bundle.graph("connector"), CPU, threads=1)
    with pytest.raises(
        EngineError, match=r"encoder: the graph's inputs are not those .*\(image_embeds, pixel_values\)"
    ):
        OnnxRuntimeEngine(bundle.manifest.stage("encoder").contract, session, CPU)


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    file = tmp_path / "bad.onnx"
    file.write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"bad.onnx does not load: .*; export the bundle again"):
        load_session(file, CPU)


def test_a_failure_inside_onnxruntime_is_wrapped(engines: dict[str, Engine]) -> None:
    """A token id beyond the embedding is what the contract cannot see and the graph refuses."""
    with pytest.raises(EngineError, match="embed_tokens: ONNX Runtime failed: "):
        engines["embed_tokens"].run({"input_ids": np.full((1, 2), 10_000, np.int64)})


def test_a_closed_engine_says_so(bundle: Bundle) -> None:
    contract = bundle.manifest.stage("encoder").contract
    with OnnxRuntimeEngine(contract, load_session(bundle.graph("encoder"), CPU, threads=1), CPU) as engine:
        engine.run({"pixel_values": pixels()})
    with pytest.raises(EngineError, match="encoder: the engine is closed"):
        engine.run({"pixel_values": pixels()})


@pytest.mark.parametrize(
    ("text", "device"), [("cpu", ("cpu", 0)), ("cpu:0", ("cpu", 0)), ("cuda", ("cuda", 0)), ("cuda:3", ("cuda", 3))]
)
def test_devices(text: str, device: tuple[str, int]) -> None:
    assert Device.parse(text) == Device(*device)


@pytest.mark.parametrize("text", ["", "gpu", "cpu:1", "cuda:-1", "CUDA", "cuda:1 "])
def test_unknown_devices(text: str) -> None:
    with pytest.raises(InputError, match="is unknown; accepted are cpu, cuda and cuda:N"):
        Device.parse(text)


def test_cuda_graphs_without_a_gpu() -> None:
    with pytest.raises(InputError, match="CUDA graphs need a GPU and the device is cpu; give the device cuda"):
        EngineOptions(cuda_graphs=True)
    assert EngineOptions("cuda", cuda_graphs=True).cuda_graphs


def test_a_provider_that_does_not_start_is_no_silent_cpu(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """ONNX Runtime falls back to the CPU with a line in its log when a library of CUDA is missing."""

    class Fallen:
        __version__ = "0"

        class SessionOptions:
            def add_session_config_entry(self, *_: str) -> None: ...

        @staticmethod
        def get_available_providers() -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        @staticmethod
        def preload_dlls() -> None:
            asked.append("libraries")
            print("Failed to load /place/libcublasLt.so.13: undefined symbol: x")
            print("Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file")
            print("Failed to load libcurand.so.10: libcurand.so.10: cannot open shared object file")
            print("Please follow https://onnxruntime.ai/docs/install/#cuda-and-cudnn to install CUDA.")

        class InferenceSession:
            def __init__(self, *_: Any, **__: Any) -> None:
                asked.append("session")

            def get_providers(self) -> list[str]:
                return ["CPUExecutionProvider"]

    asked: list[str] = []
    monkeypatch.setattr(onnxruntime_loader, "import_onnxruntime", lambda: Fallen)
    request.addfinalizer(onnxruntime_loader.preload_libraries.cache_clear)
    onnxruntime_loader.preload_libraries.cache_clear()
    said = r"CUDAExecutionProvider did not start \(missing: libcublasLt.so.13, libcurand.so.10\); install them"
    for _ in range(2):
        with pytest.raises(DependencyError, match=said):
            load_session(bundle.graph("encoder"), Device("cuda"))
    assert asked == ["libraries", "session", "session"], "before the first session: it looks in no wheel itself"
    assert capsys.readouterr().out == "", "stdout may be for JSON"


def test_threads_reach_the_session(bundle: Bundle) -> None:
    session = load_session(bundle.graph("encoder"), CPU, threads=3)
    assert session.get_session_options().intra_op_num_threads == 3


@pytest.mark.parametrize(("stage", "stops"), [("encoder", True), ("connector", True), ("llm", False)])
def test_only_the_decoders_threads_go_on_spinning(engines: dict[str, Engine], stage: str, stops: bool) -> None:
    engine = engines[stage]
    assert isinstance(engine, OnnxRuntimeEngine)
    options, key = engine._session.get_session_options(), "session.force_spinning_stop"
    if stops:
        assert options.get_session_config_entry(key) == "1"
    else:
        with pytest.raises(RuntimeError, match="does not have configuration"):
            options.get_session_config_entry(key)


@pytest.mark.parametrize(("stage", "slow"), [("encoder", "BiasGelu"), ("connector", "SkipLayerNormalization")])
def test_slow_fusions_are_off_on_the_cpu(bundle: Bundle, tmp_path: Path, stage: str, slow: str) -> None:
    """What ONNX Runtime makes of the graph with its defaults has the operator, with ours it has not."""
    import onnx
    import onnxruntime

    ours = onnxruntime_loader._session_options(onnxruntime, CPU, 1, repeated=False)
    found = []
    for number, options in enumerate((onnxruntime.SessionOptions(), ours)):
        options.optimized_model_filepath = str(tmp_path / f"{number}.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(bundle.graph(stage), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
        found.append(slow in {node.op_type for node in graph.node})
    assert found == [True, False]
