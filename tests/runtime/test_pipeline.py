"""The chain on bundles of tiny random checkpoints, against transformers on the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.runtime.generation import NEW_TOKENS, PROMPTS, Transformers, pictures
from tests.runtime.test_greedy_tokens import check_greedy

from bridgeport.errors import CheckpointError, DependencyError, EngineError, InputError
from bridgeport.runtime import Pipeline

GetPath = Callable[[str], Path]
NAMES = ("llama-gqa-tied", "opt")


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(name: str, blip2_bundle: GetPath) -> Iterator[Pipeline]:
    with Pipeline.load(blip2_bundle(name), threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference(name: str, blip2_checkpoint: GetPath) -> Transformers:
    return Transformers(blip2_checkpoint(name))


@pytest.fixture(scope="module")
def llama(blip2_bundle: GetPath) -> Iterator[Pipeline]:
    with Pipeline.load(blip2_bundle("llama-gqa-tied"), threads=1) as loaded:
        yield loaded


def queries_of(pipeline: Pipeline) -> int:
    """Features of one picture."""
    return int(pipeline.engines["connector"].contract.outputs[0].shape[1])


def test_greedy_tokens_equal_transformers(pipeline: Pipeline, reference: Transformers) -> None:
    check_greedy(pipeline, reference)


def test_the_pytorch_engine_gives_the_same(name: str, blip2_bundle: GetPath, blip2_checkpoint: GetPath) -> None:
    checkpoint = blip2_checkpoint(name)
    with Pipeline.load(blip2_bundle(name), engine="torch", checkpoint=checkpoint, threads=1) as pipeline:
        check_greedy(pipeline, Transformers(checkpoint))


def test_repetition_penalty_equals_transformers(pipeline: Pipeline, reference: Transformers) -> None:
    images = pictures()
    options: dict[str, Any] = {"repetition_penalty": 1.8}
    expected = reference.generate(images, PROMPTS, **options)
    assert expected != reference.generate(images, PROMPTS)
    ours = pipeline.generate(images, PROMPTS, max_new_tokens=NEW_TOKENS, **options)
    assert [list(row.token_ids) for row in ours] == expected


def test_prefill_logits_equal_transformers(pipeline: Pipeline, reference: Transformers) -> None:
    prepared = pipeline.prepare(pictures(), PROMPTS)
    logits = pipeline.prefill_logits(*pipeline.merge(prepared, pipeline.encode(pictures())))
    expected = np.stack([reference.logits(*row) for row in zip(pictures(), PROMPTS, strict=True)])
    # FP32 through 7 layers, summed in another order: 1e-6 relative of logits up to 10. Another picture moves them by 1.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(logits - expected[[1, 0, 2]]).max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 3, "temperature": 0.9},
        {"seed": [3, 4, 5], "temperature": 1.2, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2},
    ],
    ids=["one seed", "a seed per row"],
)
def test_every_row_is_as_if_it_ran_alone(pipeline: Pipeline, options: dict[str, Any]) -> None:
    images = pictures()
    batch = pipeline.generate(images, PROMPTS, max_new_tokens=NEW_TOKENS, **options)
    for row, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        seed = options["seed"] if isinstance(options["seed"], int) else options["seed"][row]
        alone = pipeline.generate(image, prompt, max_new_tokens=NEW_TOKENS, **options | {"seed": seed})
        assert (alone.token_ids, alone.text) == (batch[row].token_ids, batch[row].text)
        assert alone.prompt_tokens == batch[row].prompt_tokens


def test_a_row_goes_on_after_its_neighbours_have_stopped(llama: Pipeline) -> None:
    images = pictures()
    free = llama.generate(images, PROMPTS, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    stop = free[0].token_ids[2]
    rows = llama.generate(images, PROMPTS, max_new_tokens=NEW_TOKENS, ignore_eos=True, stop_token_ids=[stop])
    for row, alone in zip(rows, free, strict=True):
        end = alone.token_ids.index(stop) + 1 if stop in alone.token_ids else NEW_TOKENS
        assert row.token_ids == alone.token_ids[:end]
        assert row.finish_reason == ("stop" if stop in alone.token_ids else "length")
    assert len({len(row.token_ids) for row in rows}) > 1


def test_seeds_repeat_and_differ(llama: Pipeline) -> None:
    def tokens(**options: Any) -> tuple[int, ...]:
        return llama.generate(pictures(1)[0], "a", temperature=1.0, max_new_tokens=NEW_TOKENS, **options).token_ids

    assert tokens(seed=1) == tokens(seed=1)
    assert tokens(seed=1) != tokens(seed=2)


def test_one_picture_with_many_prompts(llama: Pipeline) -> None:
    image = pictures(1)[0]
    rows = llama.generate(image, list(PROMPTS), max_new_tokens=5)
    assert [row.token_ids for row in rows] == [
        llama.generate(image, prompt, max_new_tokens=5).token_ids for prompt in PROMPTS
    ]


def test_one_prompt_with_many_pictures(llama: Pipeline, tmp_path: Path) -> None:
    """As files, which is how they come from the command line."""
    files = []
    for index, image in enumerate(pictures()):
        files.append(tmp_path / f"{index}.png")
        image.save(files[-1])
    rows = llama.generate(files, "a photo of", max_new_tokens=5)
    assert [row.token_ids for row in rows] == [
        llama.generate(str(file), "a photo of", max_new_tokens=5).token_ids for file in files
    ]


def test_a_list_of_one_gives_a_list(llama: Pipeline) -> None:
    assert len(llama.generate(pictures(1), "a", max_new_tokens=2)) == 1
    assert len(llama.generate(pictures(1)[0], ["a"], max_new_tokens=2)) == 1


def test_stream_joins_to_the_text(pipeline: Pipeline) -> None:
    image = pictures(1)[0]
    for prompt in PROMPTS:
        whole = pipeline.generate(image, prompt, max_new_tokens=NEW_TOKENS)
        stream = pipeline.stream(image, prompt, max_new_tokens=NEW_TOKENS)
        assert "".join(stream) == whole.text == stream.generation.text
        assert stream.generation.token_ids == whole.token_ids == stream.token_ids
        assert stream.generation.finish_reason == whole.finish_reason


def test_calls_do_not_disturb_a_stream_that_is_being_read(llama: Pipeline) -> None:
    images = pictures(2)
    expected = [llama.generate(image, "a photo of", max_new_tokens=NEW_TOKENS).token_ids for image in images]
    first = llama.stream(images[0], "a photo of", max_new_tokens=NEW_TOKENS)
    second = llama.stream(images[1], "a photo of", max_new_tokens=NEW_TOKENS)
    next(first)
    next(second)
    assert llama.generate(images[1], "a photo of", max_new_tokens=NEW_TOKENS).token_ids == expected[1]
    for stream in (first, second):
        for _ in stream:
            pass
    assert [first.token_ids, second.token_ids] == expected


def test_a_stream_is_left_early(llama: Pipeline) -> None:
    with llama.stream(pictures(1)[0], "a", max_new_tokens=NEW_TOKENS) as stream:
        next(stream)
        with pytest.raises(InputError, match="not been read to its end"):
            _ = stream.generation
    assert 0 < len(stream.token_ids) < NEW_TOKENS
    assert list(stream) == []


def test_literal_placeholder_text_stays_text(pipeline: Pipeline, reference: Transformers) -> None:
    """transformers takes the typed placeholder for one more image token; here it is nine letters like any other."""
    image, queries = pictures(1)[0], queries_of(pipeline)
    image_token = pipeline.prompt.image_token
    prompt = f"what does {image_token} mean?"
    prepared = pipeline.prepare(image, prompt)
    assert np.count_nonzero(prepared.input_ids[0] == pipeline.prompt.image_token_id) == queries
    assert prepared.image_positions[0].tolist() == list(range(queries))
    inputs_embeds, _ = pipeline.merge(prepared, pipeline.encode(image))
    text = inputs_embeds[0, queries:]
    assert np.array_equal(text, pipeline.decoder.embed([prepared.input_ids[0][queries:]])[0][0])
    assert pipeline.generate(image, prompt, max_new_tokens=3).prompt_tokens == len(prepared.input_ids[0])
    theirs = reference.processor(images=image, text=prompt, return_tensors="pt")["input_ids"][0].tolist()
    assert theirs.count(pipeline.prompt.image_token_id) == queries + 1, "the trap is gone: simplify the test"


def test_timings_and_counts(llama: Pipeline) -> None:
    result = llama.generate(pictures(1)[0], "a photo of", max_new_tokens=6, ignore_eos=True)
    assert list(result.timings_ms) == ["preprocess", "encoder", "connector", "prefill", "decode", "total"]
    assert all(value > 0 for value in result.timings_ms.values())
    parts = sum(value for stage, value in result.timings_ms.items() if stage != "total")
    assert result.timings_ms["total"] == pytest.approx(parts, abs=0.01)
    assert (len(result.token_ids), result.finish_reason) == (6, "length")
    assert result.tokens_per_second == pytest.approx(5 / result.timings_ms["decode"] * 1e3, rel=0.05)
    assert llama.generate(pictures(1)[0], "a", max_new_tokens=1).tokens_per_second is None


def test_the_default_limit_yields_to_the_context(llama: Pipeline) -> None:
    context = llama.generation.context_length
    image, prompt = pictures(1)[0], "z" * (context - 10)
    count = len(llama.prepare(image, prompt).input_ids[0])
    result = llama.generate(image, prompt, ignore_eos=True)
    assert len(result.token_ids) == context - count
    rows = llama.generate([image] * 2, [prompt, "a"], ignore_eos=True)
    assert rows[0].token_ids == result.token_ids
    assert len(rows[1].token_ids) == llama.generation.max_new_tokens


def test_what_does_not_fit_into_the_context(llama: Pipeline) -> None:
    image = pictures(1)[0]
    with pytest.raises(
        InputError, match=r"^the prompt has \d+ tokens .* max_new_tokens is 200, .* holds 128; .*at most"
    ):
        llama.generate(image, "a", max_new_tokens=200)
    with pytest.raises(InputError, match=r"^prompt 1 has \d\d\d tokens .* the context holds 128; shorten the prompt$"):
        llama.generate([image] * 2, ["a", "z" * 400])


def test_the_whole_context_can_be_used(pipeline: Pipeline, reference: Transformers) -> None:
    image, context = pictures(1)[0], pipeline.generation.context_length
    room = context - len(pipeline.prepare(image, "a photo of").input_ids[0])
    expected = reference.generate([image], ["a photo of"], max_new_tokens=room)[0]
    assert list(pipeline.generate(image, "a photo of", max_new_tokens=room).token_ids) == expected


@pytest.mark.parametrize(
    ("images", "prompt", "message"),
    [
        ([], "a", "no picture came"),
        (3, "a", "a picture is a int; accepted is"),
        (pictures(2), ["a", "b", "c"], "2 pictures and 3 prompts came"),
        (pictures(1) * 65, "a", "65 rows came, the bundle takes at most 64"),
        (pictures(1)[0], ["a"] * 65, "65 rows came, the bundle takes at most 64"),
        ("/no/such.png", "a", "/no/such.png does not exist"),
        (pictures(1)[0], [7], "a prompt must be a string"),
        (pictures(1)[0], [], "the prompt is an empty list; accepted is a string"),
        (pictures(1)[0], None, "the prompt is a NoneType; accepted is a string"),
        ([pictures(2)], "a", "2 pictures came for one prompt; this model takes at most 1"),
        ([pictures(1), pictures(1)[0]], "a", "pictures and lists of pictures came mixed"),
        (None, "a", "no picture came, and this model takes no prompt without one"),
    ],
    ids=[
        "none",
        "number",
        "pairs",
        "too many",
        "too many prompts",
        "file",
        "prompt",
        "no prompts",
        "no prompt",
        "two in one prompt",
        "mixed",
        "text only",
    ],
)
def test_bad_input(llama: Pipeline, images: Any, prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        llama.generate(images, prompt)


def test_no_picture_to_encode(llama: Pipeline) -> None:
    for call in (llama.encode, llama.cross_attention):
        with pytest.raises(InputError, match="no picture came; give at least one"):
            call([])


def test_bad_options(llama: Pipeline, blip2_bundle: GetPath) -> None:
    options: Any = {"max_tokens": 3}
    with pytest.raises(InputError, match="'max_tokens'; generation options are max_new_tokens, temperature"):
        llama.generate(pictures(1)[0], "a", **options)
    several: Any = ["a", "b"]
    with pytest.raises(InputError, match="stream takes one prompt with its pictures"):
        llama.stream(pictures(1)[0], several)
    bundle = blip2_bundle("llama-gqa-tied")
    with pytest.raises(InputError, match="engine 'tflite' is unknown; known are onnxruntime, "):
        Pipeline.load(bundle, engine="tflite")
    with pytest.raises(InputError, match="threads is 0"):
        Pipeline.load(bundle, threads=0)
    with pytest.raises(InputError, match="device 'cuda:x' is unknown"):
        Pipeline.load(bundle, device="cuda:x")
    with pytest.raises(InputError, match="pass checkpoint=DIR"):
        Pipeline.load(bundle, engine="torch")


def test_a_device_that_is_not_there(blip2_bundle: GetPath) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA; run `pytest -m gpu` for it")
    with pytest.raises(DependencyError, match="'cuda' needs CUDAExecutionProvider, but onnxruntime"):
        Pipeline.load(blip2_bundle("llama-gqa-tied"), device="cuda")


def test_a_foreign_checkpoint_is_refused(blip2_bundle: GetPath, blip2_checkpoint: GetPath) -> None:
    with pytest.raises(CheckpointError, match="is not that of the bundle"):
        Pipeline.load(blip2_bundle("llama-gqa-tied"), engine="torch", checkpoint=blip2_checkpoint("llama-mqa-wide"))


def test_a_closed_pipeline_says_so(blip2_bundle: GetPath) -> None:
    with Pipeline.load(blip2_bundle("llama-gqa-tied"), threads=1) as pipeline:
        pass
    with pytest.raises(EngineError, match="encoder: the engine is closed"):
        pipeline.encode(pictures(1)[0])


def test_cross_attention(llama: Pipeline) -> None:
    """Per layer, head and query it sums to 1 over the image tokens; layers 0 and 2 of 3 have it."""
    maps = llama.cross_attention(pictures(2))
    queries, tokens = queries_of(llama), llama.engines["connector"].contract.inputs[0].shape[1]
    assert maps.shape == (2, 2, 2, queries, tokens)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=0, atol=1e-5)
    assert np.array_equal(maps[1], llama.cross_attention(pictures(2)[1])[0])


def test_features_do_not_depend_on_the_batch(llama: Pipeline) -> None:
    images: list[Image.Image] = pictures()
    together = llama.encode(images)
    alone = np.concatenate([llama.encode(image) for image in images])
    assert together.shape == (3, queries_of(llama), 64)
    # The same sums, blocked otherwise by the matrix library: FP32 rounding of values around 3.
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)
