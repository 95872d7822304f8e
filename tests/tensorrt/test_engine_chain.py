"""The whole chain through TensorRT engines over the doubles: the text is ONNX Runtime's."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.export.tensorrt.bundles import write_bundle
from tests.tensorrt.cuda_double import COMPUTE_MS, COPY_MS
from tests.tensorrt.engines import Doubles, install_doubles, write_engines
from tests.tensorrt.listing import VERSIONS

from bridgeport import cli
from bridgeport.bundle import Bundle, write_manifest
from bridgeport.engine_record import BuildOptions
from bridgeport.errors import EngineError, InputError
from bridgeport.export.passes.standard_decoder import write_standard_decoder
from bridgeport.export.tensorrt import build
from bridgeport.export.tensorrt.build import BuildRun, build_bundle
from bridgeport.export.tensorrt.worker import Reporter, build_stage
from bridgeport.models.small import checkpoint_path
from bridgeport.models.small.pictures import held_out
from bridgeport.runtime import Pipeline
from bridgeport.runtime.backends import EngineOptions
from bridgeport.runtime.kv_cache import KvCache
from bridgeport.runtime.tensorrt import load_engines
from bridgeport.runtime.tensorrt.concatenated import ConcatenatedTensorRtEngine
from bridgeport.runtime.tensorrt.device import DeviceArray
from bridgeport.runtime.tensorrt.runner import TensorRtEngine

PROMPTS = ["what is this", "is this a red shape in", "shape"]


def pictures(count: int) -> list[Any]:
    return [example.image for example in held_out(count)]


def load(bundle: Bundle) -> Pipeline:
    options = EngineOptions()
    return Pipeline(bundle, load_engines(bundle, options), options)


def answers(pipeline: Pipeline, prompts: list[str], **options: Any) -> list[Any]:
    """Token ids and the logits' effect on text: alone, as one batch, without a picture's batch of equal prompts."""
    images = pictures(len(prompts))
    rows = [*pipeline.generate(images, prompts, **options), pipeline.generate(images[1], prompts[1], **options)]
    rows += pipeline.generate(images[::-1], prompts[0], **options)
    return [(row.text, list(row.token_ids)) for row in rows]


@pytest.mark.parametrize("version", VERSIONS)
def test_text_is_that_of_onnxruntime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    source = write_bundle(tmp_path / "bundle")
    with Pipeline.load(source, threads=1) as pipeline:
        expected = answers(pipeline, PROMPTS, ignore_eos=True, max_new_tokens=6)
    assert len({str(one) for one in expected}) > 2, "answers must differ"
    doubles = install_doubles(monkeypatch, tmp_path, version)
    with load(write_engines(source, tmp_path / "engines", doubles.api)) as pipeline:
        assert answers(pipeline, PROMPTS, ignore_eos=True, max_new_tokens=6) == expected
    doubles.tensorrt.check_order()
    assert doubles.cuda.left() == {}, "closing frees all"


@pytest.mark.parametrize(("version", "strip"), [("10.3", True), ("11.4", False)])
def test_what_build_wrote_loads_and_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, strip: bool
) -> None:
    """`build_bundle`, the check of the bundle, the loader and the chain, one after the other."""
    source = write_bundle(tmp_path / "bundle")
    with Pipeline.load(source, threads=1) as pipeline:
        expected = answers(pipeline, PROMPTS, ignore_eos=True, max_new_tokens=6)
        assert pipeline.generate(pictures(1)[0], PROMPTS[0], ignore_eos=True, max_new_tokens=36).token_ids
    doubles = install_doubles(monkeypatch, tmp_path, version)
    monkeypatch.setattr(build, "run_child", lambda job, _: build_stage(job, Reporter(io.StringIO())))
    chosen: Any = {"options": BuildOptions(strip=strip), "run": BuildRun(skip_preflight=True)}
    build_bundle(source.path, tmp_path / "engines", profiles=["batch=1,1,4 llm.total_sequence=1,8,40"], **chosen)
    with Pipeline.load(tmp_path / "engines") as pipeline:
        assert isinstance(pipeline.engines["llm"], ConcatenatedTensorRtEngine)
        assert answers(pipeline, PROMPTS, ignore_eos=True, max_new_tokens=6) == expected
        # What the profile leaves out is refused at the prompt, not in the middle of the answer.
        with pytest.raises(InputError, match="the context holds 40"):
            pipeline.generate(pictures(1)[0], PROMPTS[0], ignore_eos=True, max_new_tokens=36)
    doubles.tensorrt.check_order()
    assert doubles.cuda.left() == {}


def test_the_small_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_bundle: Path) -> None:
    prompts = ["", "Question: how many shapes are there? Answer:", "Question: what color is it? Answer:"]
    with Pipeline.load(small_bundle, threads=1) as pipeline:
        expected = answers(pipeline, prompts, max_new_tokens=24)
    standard = write_standard_bundle(Bundle.load(small_bundle), tmp_path / "standard")
    doubles = install_doubles(monkeypatch, tmp_path)
    with load(write_engines(standard, tmp_path / "engines", doubles.api)) as pipeline:
        assert answers(pipeline, prompts, max_new_tokens=24) == expected
        llm: Any = pipeline.engines["llm"]
        assert not llm.replays
    switched = doubles.tensorrt.of("IExecutionContext.set_optimization_profile_async")
    assert {call.arguments["profile_index"] for call in switched} == {0, 1}, "prefill and decode"
    doubles.tensorrt.check_order()


@pytest.mark.slow  # PyTorch runs the checkpoint
def test_parity_of_engines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    standard = write_standard_bundle(Bundle.load(small_bundle), tmp_path / "standard")
    doubles = install_doubles(monkeypatch, tmp_path)
    write_engines(standard, tmp_path / "engines", doubles.api)
    picture = tmp_path / "picture.png"
    pictures(1)[0].save(picture)
    words = ["parity", str(tmp_path / "engines"), "--reference", str(checkpoint_path()), "--image", str(picture)]
    assert cli.main(words) == 0
    assert "greedy tokens equal" in " ".join(capsys.readouterr().out.split())
    assert doubles.tensorrt.of("IExecutionContext.execute_async_v3")


def write_standard_bundle(source: Bundle, folder: Path) -> Bundle:
    """`source` with the standard form of its decoder, whose cache grows by concatenation."""
    shutil.copytree(source.path, folder)
    for file in ("decoder.onnx", "decoder.onnx.data"):
        (folder / "llm" / file).unlink()
    write_standard_decoder(source.graph("llm"), folder / "llm" / "decoder.onnx")
    assert source.manifest.kv_cache is not None
    cache = source.manifest.kv_cache.model_copy(update={"shared_buffer": False})
    return Bundle(folder, write_manifest(folder, source.manifest.model_copy(update={"kv_cache": cache})))


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Doubles:
    return install_doubles(monkeypatch, tmp_path)


@pytest.fixture
def engines(doubles: Doubles, tmp_path: Path) -> Bundle:
    return write_engines(write_bundle(tmp_path / "bundle"), tmp_path / "engines", doubles.api)


def test_features_stay_on_the_device(doubles: Doubles, engines: Bundle) -> None:
    with load(engines) as pipeline:
        assert pipeline.resident
        pipeline.generate(pictures(2), PROMPTS[:2], max_new_tokens=3, ignore_eos=True)
        doubles.cuda.copies.clear()
        pipeline.generate(pictures(2), PROMPTS[:2], max_new_tokens=3, ignore_eos=True)
    to_host = [size for way, size in doubles.cuda.copies if way == "DeviceToHost"]
    assert to_host == [2 * 12 * 4] * 3, "the logits of two rows, three times, and nothing else"
    pixels = 2 * 3 * 4 * 4 * 4
    to_device = [size for way, size in doubles.cuda.copies if way == "HostToDevice"]
    assert to_device[0] == pixels
    assert max(to_device[1:]) < pixels, "then token ids, masks and positions alone"


def test_engines_are_picked_by_the_bundle(doubles: Doubles, engines: Bundle) -> None:
    """And its graphs are still there for ONNX Runtime."""
    with Pipeline.load(engines) as pipeline:
        assert {type(engine) for engine in pipeline.engines.values()} == {TensorRtEngine, ConcatenatedTensorRtEngine}
        found = pipeline.generate(pictures(1)[0], PROMPTS[1]).text
    with Pipeline.load(engines, engine="onnxruntime", threads=1) as pipeline:
        assert not pipeline.resident
        assert pipeline.generate(pictures(1)[0], PROMPTS[1]).text == found


def test_activations_are_shared(doubles: Doubles, engines: Bundle) -> None:
    with load(engines):
        told = doubles.tensorrt.of("IExecutionContext.set_device_memory")
    assert [call.arguments["memory"] for call in told] == [told[0].arguments["memory"]] * 4
    assert {
        call.arguments["strategy"].name for call in doubles.tensorrt.of("ICudaEngine.create_execution_context")
    } == {"USER_MANAGED"}
    sizes = [call.arguments["size"] for call in told]
    assert min(sizes) == max(sizes) >= 4 * 64 * 8 * 4, "as large as the largest stage needs"


def test_two_answers_at_once(doubles: Doubles, engines: Bundle) -> None:
    """A stream that is read while another call runs: caches and device arrays are each call's own."""
    options: Any = {"max_new_tokens": 6, "ignore_eos": True}
    with load(engines) as pipeline:
        one, other = pictures(2)
        alone = pipeline.generate(one, PROMPTS[0], **options).text
        between = pipeline.generate(other, PROMPTS[1], **options).text
        stream = pipeline.stream(one, PROMPTS[0], **options)
        pieces = []
        for piece in stream:
            pieces.append(piece)
            assert pipeline.generate(other, PROMPTS[1], **options).text == between
        assert "".join(pieces) == alone


def test_caches(doubles: Doubles, engines: Bundle) -> None:
    with load(engines) as pipeline:
        llm: Any = pipeline.engines["llm"]
        before = doubles.cuda.used()
        cache = llm.allocate_cache(2, 8)
        assert doubles.cuda.used() - before == 4 * 2 * 8 * 8 * 4, "past and present of a key and a value"
        mask = (np.arange(4) < np.array([[2], [4]])).astype(np.int64)
        inputs: Any = {"inputs_embeds": np.ones((2, 4, 8), np.float32), "attention_mask": mask}
        llm.run({**inputs, "logits_position": np.array([1, 3])}, cache=cache)
        step: Any = {"inputs_embeds": np.ones((2, 1, 8), np.float32), "logits_position": np.zeros(2, np.int64)}
        for value, lengths, added in ((2, [3, 5], [1, 1]), (3, [3, 6], [0, 1])):
            mask = (np.arange(8) < np.array(lengths)[:, None]).astype(np.int64)
            embeds = np.full((2, 1, 8), value, np.float32)
            llm.run({**step, "inputs_embeds": embeds, "attention_mask": mask}, cache=cache)
            assert cache.places.held[:, -1].tolist() == added
        keys = DeviceArray(cache.blocks.past[0], 0, (2, 1, 6, 8), np.dtype(np.float32))
        np.testing.assert_array_equal(np.asarray(keys)[0, 0, :, 0], [1, 1, 1, 1, 2, 3])
        with pytest.raises(EngineError, match="the cache is of another engine"):
            llm.run({**step, "attention_mask": mask}, cache=KvCache.allocate(cache.contract, 2, 8))
        for _ in range(2):
            llm.run({**step, "attention_mask": mask}, cache=cache)
        with pytest.raises(EngineError, match="9 places with the padding came, the cache holds 8"):
            llm.run({**step, "attention_mask": mask}, cache=cache)


def test_a_cache_in_half_precision(doubles: Doubles, engines: Bundle) -> None:
    manifest = engines.manifest
    assert manifest.kv_cache is not None
    half = manifest.model_copy(update={"kv_cache": manifest.kv_cache.model_copy(update={"dtype": "float16"})})
    with pytest.raises(EngineError, match=r"input 'past_key_values.0.key' is float32 in the engine and float16"):
        load(Bundle(engines.path, half))


def test_times_on_the_device(doubles: Doubles, engines: Bundle) -> None:
    """As `bridgeport bench` tells them: prefill and decode apart, by the double's clock."""
    from bridgeport.runtime.bench.bundle_chain import device_latency, prepare_job
    from bridgeport.runtime.bench.report import BenchReport, PeerResult, Round

    with load(engines) as pipeline:
        job = prepare_job(pipeline, pictures(1)[0], PROMPTS[0], 4)
        found = device_latency(pipeline, job, 3)
        assert set(found) == {"encoder", "connector", "embed_tokens", "prefill", "decode"}
        assert found["encoder"]["compute"]["p99"] == COMPUTE_MS
        assert found["connector"]["h2d"]["max"] == 0, "its input is on the device already"
        assert found["prefill"]["h2d"]["p50"] == 2 * COPY_MS, "mask and position; the embeddings are there"
        assert found["decode"]["d2h"]["min"] == COPY_MS
        again: Any = pipeline.engines["encoder"]
        assert again.latencies() == []
    seconds = dict.fromkeys(("encoder", "connector", "prefill", "decode"), 0.1)
    round_ = Round(seconds, (1, 2), 1)
    result = PeerResult("mine", "bridgeport", (round_,), np.ones((1, 2, 8), np.float32), True, found)
    report = BenchReport((result,), threads=1, new_tokens=2, prompt_tokens=3)
    assert "mine, decode\nH2D Latency: min = 1 ms" in report.device_text()
    assert report.to_json()["peers"][0]["device_ms"] == found


def test_no_times_on_the_device_elsewhere(tmp_path: Path) -> None:
    from bridgeport.runtime.bench.bundle_chain import device_latency, prepare_job

    with Pipeline.load(write_bundle(tmp_path / "bundle"), threads=1) as pipeline:
        assert device_latency(pipeline, prepare_job(pipeline, pictures(1)[0], PROMPTS[0], 2), 1) == {}


@pytest.mark.slow  # starts a process
def test_a_peer_answers_for_the_device(tmp_path: Path) -> None:
    from bridgeport.runtime.bench import Contestant, measure
    from bridgeport.runtime.bench.bundle_chain import prepare_job

    bundle = write_bundle(tmp_path / "bundle")
    with Pipeline.load(bundle, threads=1) as pipeline:
        job = prepare_job(pipeline, pictures(1)[0], PROMPTS[0], 2)
    report = measure([Contestant("graphs", "bridgeport", bundle.path, engines=True)], job, rounds=1, threads=1)
    assert report.results[0].device_ms == {}, "asked, and no stage is an engine"
    assert report.device_text() == ""
