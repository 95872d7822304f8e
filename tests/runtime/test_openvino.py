"""The OpenVINO engine: the outputs of ONNX Runtime, and which stages stay there."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridgeport.bundle import Bundle, write_manifest
from bridgeport.errors import DependencyError, EngineError, InputError
from bridgeport.manifest import QuantizationRecord
from bridgeport.runtime import Pipeline
from bridgeport.runtime.backends import EngineOptions, load_engines
from bridgeport.runtime.engine import Engine
from bridgeport.runtime.onnxruntime import OnnxRuntimeEngine
from bridgeport.runtime.openvino import OpenVinoEngine, load_engine, why_not
from bridgeport.runtime.openvino import loader as openvino_loader

GetPath = Callable[[str], Path]
OPTIONS = EngineOptions(threads=1)


@pytest.fixture(scope="module")
def bundle(blip2_bundle: GetPath) -> Bundle:
    return Bundle.load(blip2_bundle("llama-gqa-tied"))


def test_without_openvino(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    openvino_loader._core.cache_clear()
    with pytest.raises(DependencyError, match=r"install it with `pip install 'bridgeport\[openvino\]'`, or use"):
        load_engines("openvino", bundle, OPTIONS)


def test_other_devices_are_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="device 'cuda': the openvino engine runs on cpu"):
        load_engines("openvino", bundle, EngineOptions(device="cuda"))


@pytest.fixture(scope="module")
def engines(bundle: Bundle) -> Iterator[dict[str, Engine]]:
    pytest.importorskip("openvino", reason="needs openvino: pip install 'bridgeport[openvino]'")
    yield (loaded := load_engines("openvino", bundle, OPTIONS))
    for engine in loaded.values():
        engine.close()


def test_the_decoder_stays_on_onnxruntime(engines: dict[str, Engine], bundle: Bundle) -> None:
    assert {name: type(engine) for name, engine in engines.items()} == {
        "encoder": OpenVinoEngine,
        "connector": OpenVinoEngine,
        "embed_tokens": OpenVinoEngine,
        "llm": OnnxRuntimeEngine,
    }
    assert why_not(bundle, "llm") == "its key/value cache is shared with the graph, which OpenVINO cannot do"
    assert why_not(bundle, "encoder") is None


@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_are_those_of_onnxruntime(engines: dict[str, Engine], bundle: Bundle, batch: int) -> None:
    pixels = np.random.default_rng(3).normal(size=(batch, 3, 28, 28)).astype(np.float32)
    features: dict[str, Any] = {}
    reference = load_engines("onnxruntime", bundle, OPTIONS)
    for name, loaded in (("openvino", engines), ("onnxruntime", reference)):
        embeds = loaded["encoder"].run({"pixel_values": pixels})
        features[name] = loaded["connector"].run(embeds)["image_features"]
    # Two orders of FP32 sums, 1e-6 of values around 1; bf16 arithmetic, OpenVINO's own default where the processor
    # has it, is 3e-3 away.
    np.testing.assert_allclose(features["openvino"], features["onnxruntime"], atol=2e-5, rtol=1e-5)


def test_a_bound_call_reads_and_writes_the_arrays_in_place(engines: dict[str, Engine]) -> None:
    engine = engines["embed_tokens"]
    ids = np.array([[3, 5]], np.int64)
    table = engine.run({"input_ids": np.array([[3, 5, 7]], np.int64)})["inputs_embeds"]
    out = {"inputs_embeds": np.zeros((1, 2, table.shape[-1]), np.float32)}
    call = engine.bind({"input_ids": ids}, out)
    call()
    np.testing.assert_array_equal(out["inputs_embeds"], table[:, :2])
    ids[0, 0] = 7
    call()
    np.testing.assert_array_equal(out["inputs_embeds"], table[:, [2, 1]])


def test_generation_is_the_same(engines: dict[str, Engine], bundle: Bundle, held_out_picture: Path) -> None:
    answers = []
    for engine in ("openvino", "onnxruntime"):
        with Pipeline.load(bundle.path, engine=engine, threads=1) as pipeline:
            answers.append(pipeline.generate(held_out_picture, "what is it?", max_new_tokens=6).token_ids)
    assert answers[0] == answers[1]


def test_a_closed_engine_says_so(bundle: Bundle, engines: dict[str, Engine]) -> None:
    engine = load_engine(bundle, "embed_tokens", OPTIONS)
    engine.close()
    with pytest.raises(EngineError, match="embed_tokens: the engine is closed"):
        engine.run({"input_ids": np.zeros((1, 2), np.int64)})


def test_a_foreign_graph_is_caught(bundle: Bundle, engines: dict[str, Engine]) -> None:
    compiled = openvino_loader.compile_graph(bundle.graph("embed_tokens"), threads=1)
    with pytest.raises(EngineError, match=r"the graph's inputs are not those of the manifest \(input_ids, pixel_val"):
        OpenVinoEngine(bundle.manifest.stage("encoder").contract, compiled)


def test_a_broken_graph_says_what_is_wrong(engines: dict[str, Engine], tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"model\.onnx does not load in OpenVINO: .+; use the engine onnxruntime"):
        openvino_loader.compile_graph(file)


@pytest.mark.parametrize("scheme", ["dynamic-s8", "qdq-u8s8"])
def test_schemes_of_onnxruntime_stay_there(
    scheme: str, engines: dict[str, Engine], bundle: Bundle, tmp_path: Path
) -> None:
    shutil.copytree(bundle.path, tmp_path / "bundle")
    stages = tuple(
        stage.model_copy(update={"quantization": QuantizationRecord(scheme=scheme)})
        if stage.contract.name == "connector"
        else stage
        for stage in bundle.manifest.stages
    )
    manifest = write_manifest(tmp_path / "bundle", bundle.manifest.model_copy(update={"stages": stages}))
    reason = why_not(Bundle(tmp_path / "bundle", manifest), "connector")
    assert (reason is None) == (scheme == "qdq-u8s8")
    assert reason is None or "dynamic-s8 is made of ONNX Runtime's own INT8 operators" in reason
