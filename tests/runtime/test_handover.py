"""Prompts for other LLM engines: what they read back is what the chain computes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.runtime.generation import pictures

from bridgeport.bundle import Bundle
from bridgeport.errors import EngineError, InputError, OutputError, UnsupportedError
from bridgeport.runtime import Pipeline
from bridgeport.runtime.handover import (
    FORMATS,
    PromptEmbeddings,
    check_request,
    embed_prompt,
    load_embedder,
    prompt_table,
    vllm_request,
    vllm_tensor,
    write_prompt,
)
from bridgeport.runtime.tensor_files import cast_floats, safetensors_file, torch_file

GetPath = Callable[[str], Path]
PROMPT = "Question: what colour is the triangle? Answer:"


@pytest.fixture(scope="module", params=["llama-gqa-tied", "opt"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(name: str, blip2_bundle: GetPath) -> Iterator[Pipeline]:
    with Pipeline.load(blip2_bundle(name), threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def embeddings(name: str, blip2_bundle: GetPath) -> PromptEmbeddings:
    with load_embedder(blip2_bundle(name), threads=1) as embedder:
        return embed_prompt(embedder, pictures(1)[0], PROMPT)


def load(data: bytes) -> torch.Tensor:
    """As vLLM does (`safe_load_prompt_embeds`)."""
    tensor = torch.load(io.BytesIO(data), weights_only=True, map_location=torch.device("cpu"))
    assert isinstance(tensor, torch.Tensor)
    return tensor


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 8), (2, 3, 5), (70000, 2)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_reads_the_tensor_file(shape: tuple[int, ...], dtype: Any) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = load(torch_file(cast_floats(values, dtype), dtype))
    assert found.dtype == getattr(torch, dtype)
    assert found.is_contiguous()
    assert torch.equal(found, torch.from_numpy(values).to(getattr(torch, dtype)))


def test_bfloat16_rounds_ties_to_even() -> None:
    # Halfway between two bfloat16 values, below an odd and an even one; and a sum that carries into the exponent.
    values = np.array([[0x3F808000, 0x3F818000, 0x3FFFFFFF, 0x00000001]], np.uint32).view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(cast_floats(values, "bfloat16").view(np.int16), expected)


def test_safetensors_reads_the_other_file(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    values = {"image.0": np.arange(6, dtype=np.float32).reshape(2, 3), "ids": np.array([[7, 8]], np.int32)}
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors_file({key: (one, str(one.dtype)) for key, one in values.items()}, {"a": "b"}))
    found = load_file(file)
    assert set(found) == set(values)
    for key, one in values.items():
        np.testing.assert_array_equal(found[key], one)


@pytest.mark.parametrize(
    ("values", "dtype", "said"),
    [
        ([[1.0, float("nan")]], "float32", "hold NaN or infinity"),
        ([[float("-inf")]], "bfloat16", "hold NaN or infinity"),
        ([[70000.0]], "float16", r"reach 7e\+04, beyond float16 \(6.55e\+04\); use bfloat16"),
        ([[1.0]], "float64", "dtype 'float64' is unknown; accepted are float32, float16, bfloat16"),
    ],
)
def test_values_that_no_engine_could_use(values: Any, dtype: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        cast_floats(np.array(values, np.float32), dtype)


def merged(pipeline: Pipeline, images: Any, prompt: str) -> NDArray[np.float32]:
    """The prompt's embeddings as `generate` merges them."""
    prepared = pipeline.prepare([images], prompt)
    features = [np.concatenate([pipeline.encode(image)[0] for image in images])]
    inputs_embeds, _ = pipeline.merge(prepared, features)
    found: NDArray[np.float32] = inputs_embeds[0]
    return found


def test_the_embeddings_are_those_of_the_chain(pipeline: Pipeline, embeddings: PromptEmbeddings) -> None:
    np.testing.assert_array_equal(embeddings.inputs_embeds, merged(pipeline, pictures(1), PROMPT))
    np.testing.assert_array_equal(
        embeddings.inputs_embeds[embeddings.image_positions], np.concatenate(embeddings.image_features)
    )


def test_vllm_tensor_gives_the_language_model_the_same_answer(
    name: str, pipeline: Pipeline, embeddings: PromptEmbeddings, blip2_checkpoint: GetPath
) -> None:
    """transformers' own decoder, given nothing but the file, as vLLM is."""
    from transformers import Blip2ForConditionalGeneration

    tensor = load(vllm_tensor(embeddings))
    assert tensor.shape == embeddings.inputs_embeds.shape
    model: Any = Blip2ForConditionalGeneration.from_pretrained(blip2_checkpoint(name)).language_model
    found = model.generate(inputs_embeds=tensor[None], max_new_tokens=8, do_sample=False)[0].tolist()
    wanted = pipeline.generate(pictures(1)[0], PROMPT, max_new_tokens=8).token_ids
    assert tuple(found) == wanted
    shifted = model.generate(inputs_embeds=tensor.roll(1, 0)[None], max_new_tokens=8, do_sample=False)[0].tolist()
    assert tuple(shifted) != wanted  # the answer does depend on the file


def test_vllm_request_is_what_the_server_decodes(embeddings: PromptEmbeddings) -> None:
    body = json.loads(json.dumps(vllm_request(embeddings, "llm", "bfloat16", max_tokens=9)))
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("llm", 9, 0)
    found = load(base64.b64decode(body["prompt_embeds"], validate=True))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.from_numpy(embeddings.inputs_embeds).to(torch.bfloat16))


def looked_up(ids: NDArray[np.int32], words: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """PromptTuningEmbedding, as TensorRT-LLM and TensorRT-Edge-LLM say it: an id beyond the words reads the table."""
    vocabulary = len(words)
    return np.stack([rows[token - vocabulary] if token >= vocabulary else words[token] for token in ids])


def test_ids_and_table_give_the_same_embeddings(pipeline: Pipeline, embeddings: PromptEmbeddings) -> None:
    found = prompt_table(embeddings)
    assert found.input_ids.dtype == found.tasks.dtype == np.int32
    assert found.input_ids.shape == found.tasks.shape == found.extra_ids.shape
    embed_tokens = pipeline.engines["embed_tokens"]
    parts = np.split(np.arange(embeddings.vocab_size), range(64, embeddings.vocab_size, 64))
    table = np.concatenate([embed_tokens.run({"input_ids": part[None]})["inputs_embeds"][0] for part in parts])
    np.testing.assert_array_equal(looked_up(found.input_ids[0], table, found.table[0]), embeddings.inputs_embeds)
    turned = looked_up(found.input_ids[0], table, np.roll(found.table[0], 1, axis=0))
    assert (turned != embeddings.inputs_embeds).any()


def test_extra_ids_tell_pictures_apart(pipeline: Pipeline, embeddings: PromptEmbeddings) -> None:
    first, second = prompt_table(embeddings), prompt_table(embed_prompt(pipeline, pictures(2)[1], PROMPT))
    places = embeddings.image_positions
    np.testing.assert_array_equal(first.input_ids, second.input_ids)
    assert not np.delete(first.extra_ids[0], places).any()
    assert len(set(first.extra_ids[0, places].tolist()) | set(second.extra_ids[0, places].tolist())) == 2


def test_a_token_beyond_the_vocabulary_is_refused(embeddings: PromptEmbeddings) -> None:
    ids = embeddings.input_ids.copy()
    ids[-1] = embeddings.vocab_size
    beyond = PromptEmbeddings(
        embeddings.inputs_embeds, ids, embeddings.image_positions, embeddings.image_features, embeddings.vocab_size
    )
    with pytest.raises(InputError, match="is beyond the language model's vocabulary"):
        prompt_table(beyond)


def test_the_directory_for_tensorrt_llm(embeddings: PromptEmbeddings, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    out = write_prompt(embeddings, tmp_path / "prompt", "tensorrt-llm", dtype="float16")
    table, ids = np.load(out / "prompt_table.npy"), np.load(out / "input_ids.npy")
    facts = json.loads((out / "prompt.json").read_text())
    assert table.dtype == np.float16
    assert table.shape == (1, facts["prompt_vocab_size"], facts["hidden_size"])
    assert ids.dtype == np.int32
    assert ids.max() == facts["vocab_size"] + facts["prompt_vocab_size"] - 1
    assert np.load(out / "prompt_tasks.npy").shape == np.load(out / "input_token_extra_ids.npy").shape == ids.shape
    np.testing.assert_array_equal(np.loadtxt(out / "input_ids.csv", np.int32, delimiter=",", ndmin=2), ids)
    np.testing.assert_array_equal(load_file(out / "image_features.safetensors")["image.0"], table[0])
    assert facts["token_ids"] == embeddings.input_ids.tolist()
    with pytest.raises(OutputError, match="exists"):
        write_prompt(embeddings, out, "tensorrt-llm")


def test_the_language_model_is_not_loaded(blip2_bundle: GetPath) -> None:
    refused = pytest.raises(EngineError, match="llm: not loaded; this pipeline only embeds prompts")
    with load_embedder(blip2_bundle("opt"), threads=1) as embedder, refused:
        embedder.generate(pictures(1)[0], max_new_tokens=1)


@pytest.mark.parametrize(("field", "why"), [("flamingo", "cross-attention"), ("seq2seq", "an encoder of its own")])
def test_models_whose_pictures_are_no_prompt_embeddings(field: str, why: str, blip2_bundle: GetPath) -> None:
    bundle = Bundle.load(blip2_bundle("opt"))
    other = Bundle(bundle.path, bundle.manifest.model_copy(update={field: object()}))
    with pytest.raises(UnsupportedError, match=f"cannot be handed to another LLM engine: .*{why}"):
        load_embedder(other)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trt", "float32", ""), "format 'trt' is unknown; accepted are vllm, vllm-request, tensorrt-llm"),
        (("vllm", "int8", ""), "dtype 'int8' is unknown"),
        (("vllm-request", "float32", ""), "names the served model; give --model"),
        (("tensorrt-llm", "bfloat16", ""), "numpy files have no such type"),
    ],
)
def test_bad_requests(words: tuple[str, str, str], said: str) -> None:
    assert check_request("vllm", "bfloat16") == (FORMATS[0], "bfloat16")
    with pytest.raises(InputError, match=said):
        check_request(*words)


def test_files_are_not_replaced_unasked(embeddings: PromptEmbeddings, tmp_path: Path) -> None:
    out = write_prompt(embeddings, tmp_path / "p.pt", "vllm")
    first = out.read_bytes()
    with pytest.raises(OutputError, match=r"exists; name another file, or replace it with --force"):
        write_prompt(embeddings, out, "vllm", dtype="float16")
    assert out.read_bytes() == first
    write_prompt(embeddings, out, "vllm", dtype="float16", force=True)
    assert load(out.read_bytes()).dtype == torch.float16
    assert [file.name for file in tmp_path.iterdir()] == ["p.pt"]
    with pytest.raises(OutputError, match="is a directory; name a file"):
        write_prompt(embeddings, tmp_path, "vllm", force=True)
