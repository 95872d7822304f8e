"""On a machine with an NVIDIA GPU and TensorRT: build, run, and compare with ONNX Runtime. Nothing here is a double.

``make test-jetson`` (or ``pytest -m tensorrt tests/tensorrt/test_on_device.py``), docs/testing-on-devices.md.
BRIDGEPORT_TEST_BUNDLE=DIR: a bundle for TensorRT to build from, for a machine that cannot export the small model.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridgeport.bundle import Bundle, write_manifest
from bridgeport.errors import BridgeportError, EngineError
from bridgeport.runtime import Pipeline
from bridgeport.runtime.backends import EngineOptions

VARIABLE = "BRIDGEPORT_TEST_BUNDLE"
# By the precision of a stage: engines sum in another order than ONNX Runtime on a CPU, FP16 ones round at every node.
# A wrong weight, mask or profile gives far less (see `test_a_wrong_row_is_seen`).
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.995, "int8": 0.97, "fp8": 0.95, "int4": 0.9}
MAX_MEAN_ERROR = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.1, "fp8": 0.15, "int4": 0.3}  # over the mean magnitude


def check_close(found: Any, expected: Any, precision: str) -> None:
    """AssertionError, with where, unless every row points the same way and the mean error is small."""
    found, expected = (np.asarray(array, np.float64).reshape(-1, array.shape[-1]) for array in (found, expected))
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = (found * expected).sum(1) / np.maximum(norms, 1e-30)
    error = np.abs(found - expected)
    mean = error.mean() / np.abs(expected).mean()
    told = (
        f"cosine {cosine.min():.6f} (row {cosine.argmin()} of {len(cosine)}), mean error {mean:.2e} of the mean "
        f"magnitude, largest {error.max():.3e} at {np.unravel_index(error.argmax(), error.shape)}"
    )
    assert np.isfinite(found).all(), told
    assert cosine.min() >= MIN_COSINE[precision], told
    assert mean <= MAX_MEAN_ERROR[precision], told


@pytest.mark.parametrize("precision", MIN_COSINE)
def test_a_wrong_row_is_seen(precision: str) -> None:
    rng = np.random.default_rng(0)
    right = rng.standard_normal((2, 8, 64))
    check_close(right + 1e-5 * rng.standard_normal(right.shape), right, precision)
    for wrong in (np.roll(right, 1, axis=1), right * 1.5, np.where(right > 3, np.nan, right), right[:, :1] + 0 * right):
        with pytest.raises(AssertionError, match="cosine"):
            check_close(wrong, right, precision)


@pytest.fixture(scope="module")
def device() -> str:
    """The machine in words; skips where no engine can be built."""
    from bridgeport.export.tensorrt.build import find_build_machine
    from bridgeport.runtime.tensorrt.memory import load_cuda

    try:
        machine = find_build_machine()
        load_cuda()
    except BridgeportError as error:
        pytest.skip(f"{error}; run it on such a machine with `make test-jetson`")
    return f"{machine.gpu}, SM {machine.compute_capability}, TensorRT {machine.tensorrt}, CUDA {machine.cuda}"


@pytest.fixture(scope="module")
def source(device: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What engines are built from."""
    named = os.environ.get(VARIABLE)
    if named:
        return Bundle.load(named)
    pytest.importorskip("torch", reason=f"exporting the small model needs torch; or set {VARIABLE} to a bundle")
    from tests.tensorrt.test_engine_chain import write_standard_bundle

    small = Bundle.load(request.getfixturevalue("small_bundle"))
    return write_standard_bundle(small, tmp_path_factory.mktemp("standard") / "bundle")


@pytest.fixture(scope="module")
def engines(source: Bundle, device: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The source, built here."""
    from bridgeport.export.tensorrt import build_bundle

    started = time.monotonic()
    built = build_bundle(source.path, tmp_path_factory.mktemp("engines") / "bundle")
    print(f"\nbuilt in {time.monotonic() - started:.0f} s on {device}")
    return Bundle.load(built.path)


@pytest.fixture(scope="module")
def pipeline(engines: Bundle) -> Iterator[Pipeline]:
    from bridgeport.runtime.tensorrt import load_engines

    options = EngineOptions(device="cuda")
    with Pipeline(engines, load_engines(engines, options), options) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference(source: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(source) as loaded:
        yield loaded


def pictures(count: int) -> list[Any]:
    from bridgeport.models.small.pictures import held_out

    return [example.image for example in held_out(count)]


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_stages(pipeline: Pipeline, reference: Pipeline) -> None:
    """Each stage on what ONNX Runtime gave the one before it, so that errors do not add up."""
    prepared = [reference.prepare_picture(picture) for picture in pictures(2)]
    embeds = reference.vision.encode(prepared)
    precision = {stage.contract.name: stage.precision for stage in pipeline.manifest.stages}
    check_close(np.concatenate(pipeline.vision.encode(prepared)), np.concatenate(embeds), precision["encoder"])
    features = reference.vision.connect(prepared, embeds)
    check_close(
        np.concatenate(pipeline.vision.connect(prepared, embeds)), np.concatenate(features), precision["connector"]
    )
    rows = reference.prepare(pictures(2), "Question: what color is it? Answer:")
    flat = [reference.vision.arrange(*one) for one in zip(prepared, features, strict=True)]
    inputs_embeds, lengths = reference.merge(rows, flat)
    found = pipeline.prefill_logits(inputs_embeds, lengths)
    check_close(found, reference.prefill_logits(inputs_embeds, lengths), precision["llm"])


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_text(pipeline: Pipeline, reference: Pipeline) -> None:
    """Greedy tokens alone and as a batch; FP32 ones are equal, others begin equally."""
    prompts = ["", "Question: how many shapes are there? Answer:"]
    options: Any = {"max_new_tokens": 16}
    found = [
        *pipeline.generate(pictures(2), prompts, **options),
        pipeline.generate(pictures(1)[0], prompts[1], **options),
    ]
    expected = [
        *reference.generate(pictures(2), prompts, **options),
        reference.generate(pictures(1)[0], prompts[1], **options),
    ]
    exact = all(stage.precision == "fp32" for stage in pipeline.manifest.stages)
    for mine, theirs in zip(found, expected, strict=True):
        count = len(theirs.token_ids) if exact else 1
        assert list(mine.token_ids)[:count] == list(theirs.token_ids)[:count], (mine.text, theirs.text)


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_graphs_give_the_same(pipeline: Pipeline) -> None:
    """The same inputs through a normal run and through replays of the captured graph, bit for bit."""
    encoder: Any = pipeline.engines["encoder"]
    inputs = {name: pipeline.prepare_picture(pictures(1)[0]).tensors[name] for name in ("pixel_values",)}
    first, *others = (encoder.run(inputs)["image_embeds"] for _ in range(4))
    assert encoder.replays, "the encoder has neither control flow nor sizes that depend on data"
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_times(pipeline: Pipeline, device: str) -> None:
    """Prints what to look at; fails for times that cannot be."""
    from bridgeport.runtime.bench.bundle_chain import device_latency, prepare_job
    from bridgeport.runtime.tensorrt.latency import as_text

    job = prepare_job(pipeline, pictures(1)[0], "Question: what color is it? Answer:", 8)
    device_latency(pipeline, job, 2)
    for stage, summary in device_latency(pipeline, job, 20).items():
        print(f"\n{device}: {stage}\n{as_text(summary)}")
        assert 0 < summary["compute"]["min"] <= summary["compute"]["p50"] <= summary["compute"]["p99"] < 60_000


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_a_shape_outside_of_the_profile(pipeline: Pipeline) -> None:
    encoder = pipeline.engines["encoder"]
    most = encoder.contract.axis("batch").max
    pixels = pipeline.prepare_picture(pictures(1)[0]).tensors["pixel_values"]
    with pytest.raises(EngineError, match=rf"axis 'batch' of pixel_values is {most + 1}, accepted is"):
        encoder.run({"pixel_values": np.repeat(pixels[:1], most + 1, axis=0)})


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_a_damaged_plan(engines: Bundle, tmp_path: Path) -> None:
    """Half of it is missing, and the manifest holds its hash: this process must live on."""
    from bridgeport.runtime.tensorrt import load_engines

    copy = tmp_path / "damaged"
    shutil.copytree(engines.path, copy)
    stage = engines.manifest.stage("connector")
    assert stage.engine is not None
    plan = copy / stage.engine.file
    data = plan.read_bytes()
    plan.write_bytes(data[: len(data) // 2])
    with pytest.raises(EngineError, match="connector does not load"):
        load_engines(Bundle(copy, write_manifest(copy, engines.manifest)), EngineOptions(device="cuda"))
