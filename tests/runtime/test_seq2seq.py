"""T5 step by step: the tokens of transformers' `generate`, whatever rows share the batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.checkpoints_t5 import T5_CONFIGS, exported_t5
from transformers import Blip2ForConditionalGeneration

from bridgeport.errors import EngineError, InputError
from bridgeport.manifest import GenerationContract
from bridgeport.runtime.engine import Engine
from bridgeport.runtime.generation import Row, generate_tokens
from bridgeport.runtime.onnxruntime import Device, OnnxRuntimeEngine, load_session
from bridgeport.runtime.sampling import Sampler, SamplingParams
from bridgeport.runtime.seq2seq import Seq2SeqDecoder, seq2seq_token_limits
from bridgeport.runtime.torch import TorchEngine

FAST = "odd"
NAMES = [FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in T5_CONFIGS if name != FAST)]
NEW_TOKENS = 12
# Token ids of the prompts after the picture: lengths 1, 4 and 30, so that rows are padded a lot.
PROMPTS = ([1], [40, 41, 42, 1], [*range(20, 49), 1])
Rows = list[tuple[int, ...]]


@cache
def reference(name: str) -> Any:
    """transformers' model of the checkpoint."""
    model: Any = Blip2ForConditionalGeneration.from_pretrained(exported_t5(name).path)
    return model.eval()


@cache
def make_decoder(name: str) -> Seq2SeqDecoder:
    exported = exported_t5(name)
    contracts = exported.layout.contracts
    device = Device.parse("cpu")
    return Seq2SeqDecoder(
        TorchEngine(contracts["embed_tokens"], exported.stages["embed_tokens"]),
        OnnxRuntimeEngine(contracts["llm_encoder"], load_session(exported.encoder, device, threads=1), device),
        OnnxRuntimeEngine(
            contracts["llm"], load_session(exported.decoder, device, threads=1), device, exported.kv_cache
        ),
        exported.seq2seq,
    )


def pictures(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(len(PROMPTS), 3, 28, 28, generator=generator)


@cache
def references(name: str) -> tuple[list[NDArray[np.float32]], Rows]:
    """Each row alone through transformers: the merged embeddings that its T5 gets, and its greedy tokens."""
    model = reference(name)
    image = [model.config.image_token_index] * model.config.num_query_tokens
    embeds, tokens = [], []
    seen: list[torch.Tensor] = []
    handle = model.language_model.encoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        for picture, prompt in zip(pictures(name), PROMPTS, strict=True):
            ids = torch.tensor([image + prompt])
            tokens.append(generate(model, pixel_values=picture[None], input_ids=ids)[0])
            embeds.append(seen[-1][0].numpy())
    finally:
        handle.remove()
    return embeds, tokens


def generate(model: Any, **inputs: Any) -> Rows:
    """Greedy tokens without the start token; what transformers fills behind a row's end is cut.

    Without a cache, because `generate` of transformers 5.23 makes one for the encoder's depth, and fails where the
    decoder is deeper.
    """
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS, "use_cache": False}
    with torch.inference_mode():
        rows = model.generate(**inputs, **options)[:, 1:].tolist()
    return [tuple(row[: row.index(1) + 1] if 1 in row else row) for row in rows]


def run(decoder: Seq2SeqDecoder, embeds: Sequence[NDArray[np.float32]], vocab_size: int) -> Rows:
    lengths = np.array([len(row) for row in embeds], np.int64)
    padded = np.zeros((len(embeds), int(lengths.max()), embeds[0].shape[1]), np.float32)
    for target, row in zip(padded, embeds, strict=True):
        target[: len(row)] = row
    params = SamplingParams(temperature=0.0)
    start = [decoder.contract.decoder_start_token_id]
    rows = [
        Row(int(n), Sampler(params, start, vocab_size, np.random.default_rng(0)), NEW_TOKENS, frozenset({1}))
        for n in lengths
    ]
    decoding = decoder.start(padded, lengths, NEW_TOKENS)
    try:
        for _ in generate_tokens(decoding, rows):
            pass
    finally:
        decoding.close()
    return [tuple(row.token_ids) for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    embeds, expected = references(name)
    decoder, vocab_size = make_decoder(name), exported_t5(name).text.vocab_size
    assert [run(decoder, [row], vocab_size)[0] for row in embeds] == expected
    assert run(decoder, embeds, vocab_size) == expected
    assert len({*expected}) > 1  # answers depend on picture and prompt, or nothing was tested


@pytest.mark.parametrize("name", NAMES)
def test_prompts_without_a_picture(name: str) -> None:
    decoder, model = make_decoder(name), reference(name).language_model
    prompts = [np.array([5, *prompt], np.int64) for prompt in PROMPTS]
    expected = [generate(model, input_ids=torch.from_numpy(ids)[None])[0] for ids in prompts]
    embeds, lengths = decoder.embed(prompts)
    rows = [row[:length] for row, length in zip(embeds, lengths, strict=True)]
    assert run(decoder, rows, exported_t5(name).text.vocab_size) == expected


def test_logits_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    embeds, _ = references(FAST)
    decoder = make_decoder(FAST)
    together = forced_logits(decoder, embeds)
    for row, alone in enumerate(embeds):
        # Sums run in another order when rows share a product: measured 2e-6 of logits of about 5.
        np.testing.assert_allclose(together[:, row], forced_logits(decoder, [alone])[:, 0], atol=2e-5, rtol=1e-5)
    assert np.abs(together[:, 0] - together[:, 1]).max() > 0.1


def forced_logits(decoder: Seq2SeqDecoder, embeds: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """`[steps, B, V]` for the same tokens in every row."""
    lengths = np.array([len(row) for row in embeds], np.int64)
    padded = np.full((len(embeds), int(lengths.max()), embeds[0].shape[1]), 3.0, np.float32)
    for target, row in zip(padded, embeds, strict=True):
        target[: len(row)] = row
    decoding = decoder.start(padded, lengths, 5)
    found = [decoding.logits.copy()]
    for token in (7, 30, 8, 100):
        decoding.step([token] * len(embeds), [True] * len(embeds))
        found.append(decoding.logits.copy())
    decoding.close()
    return np.stack(found)


def test_finished_row_leaves_the_others_alone() -> None:
    embeds, _ = references(FAST)
    decoder = make_decoder(FAST)
    lengths = np.array([len(embeds[2])] * 2, np.int64)
    both = np.stack([embeds[2]] * 2)
    decoding = decoder.start(both, lengths, 4)
    decoding.step([9, 9], [True, True])
    decoding.step([0, 10], [False, True])
    decoding.step([0, 11], [False, True])
    alone = decoder.start(both[:1], lengths[:1], 4)
    for token in (9, 10, 11):
        alone.step([token], [True])
    np.testing.assert_allclose(decoding.logits[1], alone.logits[0], atol=2e-5, rtol=1e-5)
    alone.close()
    decoding.close()


def test_prompt_is_encoded_once_and_the_cache_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    embeds, expected = references(FAST)
    decoder, vocab_size = make_decoder(FAST), exported_t5(FAST).text.vocab_size
    decoder.close()
    calls: list[str] = []

    def count(engine: Engine, method: str) -> None:
        real = getattr(engine, method)

        def counted(*args: Any, **options: Any) -> Any:
            calls.append(method)
            return real(*args, **options)

        monkeypatch.setattr(engine, method, counted)

    count(decoder.llm_encoder, "run")
    count(decoder.llm, "allocate_cache")
    count(decoder.llm, "bind")
    assert [run(decoder, embeds, vocab_size) for _ in range(2)] == [expected] * 2
    # `bind`: one for the first token and one for all further steps.
    assert calls == ["run", "allocate_cache", "bind", "bind", "run", "bind", "bind"]


def test_closed_decoding_does_not_run() -> None:
    embeds, _ = references(FAST)
    decoding = make_decoder(FAST).start(embeds[0][None], np.array([len(embeds[0])]), 2)
    decoding.close()
    with pytest.raises(RuntimeError, match="closed"):
        decoding.step([1], [True])


def test_other_inputs_are_refused() -> None:
    decoder = make_decoder(FAST)
    embeds = np.zeros((1, 2, exported_t5(FAST).text.d_model), np.float32)
    more = decoder.encode_prompt(embeds, np.array([2]))
    with pytest.raises(EngineError, match="no inputs beside its prompt"):
        decoder.start(embeds, np.array([2]), 2, more)


def test_prompt_of_another_width_is_refused() -> None:
    with pytest.raises(EngineError, match="llm_encoder: inputs_embeds"):
        make_decoder(FAST).start(np.zeros((1, 2, 3), np.float32), np.array([2]), 2)


def test_token_limits() -> None:
    contract = exported_t5(FAST).seq2seq
    generation = GenerationContract(
        eos_token_ids=(1,), pad_token_id=0, bos_token_id=None, context_length=2048, vocab_size=300, max_new_tokens=64
    )

    def limits(prompts: list[int], new: int | None) -> list[int]:
        return seq2seq_token_limits(prompts, new, generation, contract)

    # A prompt of the greatest length leaves the answer its whole length.
    assert limits([contract.max_prompt_tokens, 3], None) == [64, 64]
    assert limits([5], contract.max_new_tokens) == [contract.max_new_tokens]
    with pytest.raises(InputError, match="prompt 1 has 2049 tokens"):
        limits([3, contract.max_prompt_tokens + 1], None)
    with pytest.raises(InputError, match="max_new_tokens is 2049"):
        limits([3], contract.max_new_tokens + 1)
