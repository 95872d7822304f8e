"""The ONNX Runtime engine on a genuine GPU: `pytest -m gpu` with onnxruntime-gpu (and cuda-python for arrays that stay
on the device). What may differ from the CPU is the order of sums, and TF32 where a product is allowed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.runtime.generation import pictures

from bridgeport.bundle import Bundle
from bridgeport.errors import DependencyError
from bridgeport.runtime import Pipeline
from bridgeport.runtime.backends import EngineOptions, load_engines
from bridgeport.runtime.onnxruntime.cuda import CudaEngine

pytestmark = pytest.mark.gpu
GetPath = Callable[[str], Path]
NAME = "llama-gqa-tied"
PROMPTS = ["a photo of", "Question: what colour is the triangle? Answer:", ""]


@pytest.fixture(scope="module")
def bundle(blip2_bundle: GetPath) -> Bundle:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu and a CUDA GPU; run `make test-gpu` on such a machine")
    return Bundle.load(blip2_bundle(NAME))


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, threads=1) as loaded:
        yield loaded


def load(bundle: Bundle, *, graphs: bool = False) -> Pipeline:
    options = EngineOptions("cuda", cuda_graphs=graphs)
    try:
        return Pipeline(bundle, load_engines("onnxruntime", bundle, options), options)
    except DependencyError as error:
        pytest.skip(f"{error}")


def cosine(left: Any, right: Any) -> float:
    """The smallest over rows."""
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    return float(np.min((left * right).sum(-1) / np.linalg.norm(left, axis=-1) / np.linalg.norm(right, axis=-1)))


def test_features_equal_those_of_the_cpu(bundle: Bundle, expected: Pipeline) -> None:
    with load(bundle) as pipeline:
        found = pipeline.encode(pictures())
    # TF32 keeps 10 bits of a factor: 1e-3 relative, far above the cosine of a wrong picture (below 0.99 here).
    assert cosine(found, expected.encode(pictures())) > 0.9999
    assert cosine(found, np.roll(found, 1, axis=0)) < 0.999


@pytest.mark.parametrize("graphs", [False, True])
def test_the_chain_gives_the_same_tokens(graphs: bool, bundle: Bundle, expected: Pipeline) -> None:
    wanted = [one.token_ids for one in expected.generate(pictures(), PROMPTS, max_new_tokens=12)]
    with load(bundle, graphs=graphs) as pipeline:
        for _ in range(3):  # capture, and replay over the memory of the generation before
            found = [one.token_ids for one in pipeline.generate(pictures(), PROMPTS, max_new_tokens=12)]
            assert found == wanted


def test_features_stay_on_the_device(bundle: Bundle) -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python: pip install cuda-python")
    with load(bundle) as pipeline:
        assert pipeline.resident
        assert all(isinstance(engine, CudaEngine) for engine in pipeline.engines.values())
        embeds = pipeline.engines["encoder"].run({"pixel_values": np.zeros((2, 3, 28, 28), np.float32)}, resident=True)[
            "image_embeds"
        ]
        assert not isinstance(embeds, np.ndarray)
        features = pipeline.engines["connector"].run({"image_embeds": embeds}, resident=True)["image_features"]
        again = pipeline.engines["connector"].run({"image_embeds": np.asarray(embeds)})["image_features"]
        np.testing.assert_array_equal(np.asarray(features), again)


def test_pytorch_on_the_same_gpu_gives_the_same_tokens(bundle: Bundle, blip2_checkpoint: GetPath) -> None:
    import torch
    from transformers import Blip2ForConditionalGeneration

    if not torch.cuda.is_available():
        pytest.skip("needs torch with CUDA")
    with load(bundle) as pipeline:
        prepared = pipeline.prepare([[pictures(1)[0]]], "a photo of")
        merged, _ = pipeline.merge(prepared, [pipeline.encode(pictures(1)[0])[0]])
        found = pipeline.generate(pictures(1)[0], "a photo of", max_new_tokens=12).token_ids
    load_model: Any = Blip2ForConditionalGeneration.from_pretrained
    model = load_model(blip2_checkpoint(NAME)).language_model.cuda()
    embeds = torch.from_numpy(np.asarray(merged)).cuda()
    wanted = model.generate(inputs_embeds=embeds, max_new_tokens=12, do_sample=False)[0].tolist()
    assert list(found) == wanted


@pytest.mark.tensorrt
def test_the_tensorrt_provider_gives_the_same_features(bundle: Bundle, expected: Pipeline) -> None:
    options = EngineOptions("cuda")
    try:
        engines = load_engines("onnxruntime-tensorrt", bundle, options)
    except DependencyError as error:
        pytest.skip(f"{error}")
    with Pipeline(bundle, engines, options) as pipeline:
        found = pipeline.encode(pictures())
    assert cosine(found, expected.encode(pictures())) > 0.9999
