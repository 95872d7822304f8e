"""The cache: one buffer for past and present, bound once, reused, and never read beyond a row's length."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bridgeport.models.contract import KvCacheContract
from bridgeport.runtime import Pipeline
from bridgeport.runtime.decoder import Decoder, Decoding
from bridgeport.runtime.kv_cache import HostBuffer, KvCache, capacity_for

GetPath = Callable[[str], Path]
LENGTHS = (9, 4, 7)


@pytest.fixture(params=["llama-gqa-tied", "opt"])
def pipeline(request: pytest.FixtureRequest, blip2_bundle: GetPath) -> Iterator[Pipeline]:
    with Pipeline.load(blip2_bundle(request.param), threads=1) as loaded:
        yield loaded


def start(decoder: Decoder, lengths: tuple[int, ...] = LENGTHS, new_tokens: int = 20) -> Decoding:
    rows = [np.arange(5, 5 + length) for length in lengths]
    return decoder.start(*decoder.embed(rows), new_tokens)


def step(decoding: Decoding, times: int = 1) -> NDArray[Any]:
    for _ in range(times):
        tokens = decoding.logits.argmax(-1)
        decoding.step(tokens.tolist(), [True] * len(tokens))
    return decoding.logits


def arrays(cache: KvCache) -> list[NDArray[Any]]:
    return [buffer.array for buffer in cache.buffers if isinstance(buffer, HostBuffer)]


class RecordingSession:
    """A session that notes at which addresses its tensors are bound, and how often it ran."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs: list[tuple[str, int]] = []
        self.outputs: list[tuple[str, int]] = []
        self.runs = 0

    def io_binding(self) -> Any:
        binding = self._session.io_binding()
        bind_input, bind_output = binding.bind_input, binding.bind_output

        def note_input(name: str, *rest: Any) -> None:
            self.inputs.append((name, rest[-1]))
            bind_input(name, *rest)

        def note_output(name: str, *rest: Any) -> None:
            self.outputs.append((name, rest[-1]))
            bind_output(name, *rest)

        binding.bind_input, binding.bind_output = note_input, note_output
        return binding

    def run_with_iobinding(self, binding: Any) -> None:
        self.runs += 1
        self._session.run_with_iobinding(binding)


def test_past_and_present_are_one_buffer_bound_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    llm: Any = pipeline.engines["llm"]
    session = RecordingSession(llm._session)
    monkeypatch.setattr(llm, "_session", session)
    decoding = start(pipeline.decoder)
    step(decoding, 10)
    past = [(name, address) for name, address in session.inputs if name.startswith("past_key_values.")]
    present = [(name, address) for name, address in session.outputs if name.startswith("present.")]
    layers = llm.kv_cache.num_layers
    assert session.runs == 11
    assert len(past) == len(present) == 2 * 2 * layers  # one binding for the prefill, one for all steps
    assert [address for _, address in past] == [address for _, address in present]
    assert [name.removeprefix("past_key_values.") for name, _ in past] == [
        name.removeprefix("present.") for name, _ in present
    ]
    assert len({address for _, address in past}) == 2 * layers


def test_a_step_writes_one_position_per_row_in_place(pipeline: Pipeline) -> None:
    decoding = start(pipeline.decoder)
    cache = decoding._cache
    assert cache is not None
    before = [array.copy() for array in arrays(cache)]
    step(decoding)
    for old, new in zip(before, arrays(cache), strict=True):
        changed = (old != new).any(axis=(1, 3))
        assert [np.flatnonzero(row).tolist() for row in changed] == [[length] for length in LENGTHS]


def traced_steps(decoding: Decoding, after_each: Callable[[], object]) -> tuple[int, int]:
    """Bytes that 60 steps keep, and the most that they hold beyond what they began with."""
    step(decoding, 10)
    tracemalloc.start()
    try:
        step(decoding)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in range(60):
            step(decoding)
            after_each()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return kept - before, peak - before


def test_a_step_allocates_nothing_that_grows(pipeline: Pipeline) -> None:
    # ONNX Runtime's Python binding pools 124 bytes a run for its first 240 runs or so: run past that first.
    ids, embeds = np.zeros((1, 1), np.int64), np.zeros((1, 1, 64), np.float32)
    warm_up = pipeline.engines["embed_tokens"].bind({"input_ids": ids}, {"inputs_embeds": embeds})
    for _ in range(600):
        warm_up()
    decoding = start(pipeline.decoder, new_tokens=100)
    kept, peak = traced_steps(decoding, lambda: None)
    decoding.close()
    planted = start(pipeline.decoder, new_tokens=100)
    cache, leak = planted._cache or pytest.fail("closed"), []
    kept_with_leak, _ = traced_steps(planted, lambda: leak.append(planted.logits.copy()))
    _, peak_with_copy = traced_steps(start(pipeline.decoder, new_tokens=100), lambda: arrays(cache)[0].copy())
    # What a step needs is Python's own, lists of three tokens; one buffer of the cache has 48 KiB and more.
    assert kept < 2_000 < kept_with_leak
    assert peak < 24 * 1024 < peak_with_copy


def test_what_an_earlier_batch_left_is_not_read(pipeline: Pipeline) -> None:
    """NaN beyond every row's length: one that were read, even times zero, would make the logits NaN."""
    decoder = pipeline.decoder
    clean = start(decoder)
    expected = step(clean, 6).copy()
    clean.close()
    (spare,) = decoder._spare
    for array in arrays(spare):
        array[:] = np.nan
    again = start(decoder)
    assert again._cache is spare
    assert np.array_equal(step(again, 6), expected)


def test_the_pytorch_engine_reads_and_writes_the_same_cache(blip2_bundle: GetPath, blip2_checkpoint: GetPath) -> None:
    """Keys and values themselves are those of transformers, and a cache goes from one engine to the other."""
    name = "llama-gqa-tied"
    with (
        Pipeline.load(blip2_bundle(name), threads=1) as ours,
        Pipeline.load(blip2_bundle(name), threads=1, engine="torch", checkpoint=blip2_checkpoint(name)) as theirs,
    ):
        pair = [start(each.decoder) for each in (ours, theirs)]
        for _ in range(3):
            left, right = (step(decoding) for decoding in pair)
            # FP32 rounding through 2 layers on logits up to 10; the next token's logits differ by 1 and more.
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)
        caches = [decoding._cache or pytest.fail("closed") for decoding in pair]
        for mine, other in zip(*(arrays(cache) for cache in caches), strict=True):
            for row, length in enumerate(LENGTHS):
                written = np.s_[row, :, : length + 3]
                np.testing.assert_allclose(mine[written], other[written], rtol=1e-4, atol=1e-4)


def test_a_cache_is_reused_while_it_fits(pipeline: Pipeline) -> None:
    decoder = pipeline.decoder
    first = start(decoder)
    cache = first._cache
    first.close()
    first.close()
    smaller = start(decoder, LENGTHS[:2], new_tokens=3)
    assert smaller._cache is cache
    beside = start(decoder)
    assert beside._cache is not cache
    smaller.close()
    beside.close()
    larger = start(decoder, LENGTHS, new_tokens=80)
    assert larger._cache is not cache
    assert larger._cache is not None
    assert larger._cache.capacity == 128
    larger.close()
    decoder.close()
    assert start(decoder)._cache is not larger._cache


def test_rows_that_stopped_stand_still(pipeline: Pipeline) -> None:
    """The last row that goes on is not disturbed, and the others do not run over the end of the cache."""
    alone = start(pipeline.decoder, LENGTHS[2:], new_tokens=40)
    expected = [int(step(alone).argmax()) for _ in range(40)]
    together = start(pipeline.decoder, LENGTHS, new_tokens=40)
    got = []
    for _ in range(40):
        tokens = together.logits.argmax(-1).tolist()
        together.step(tokens, [False, False, True])
        got.append(int(together.logits[2].argmax()))
    assert got == expected
    assert together._lengths.tolist() == [*LENGTHS[:2], LENGTHS[2] + 40]


def test_a_closed_decoding_does_not_step(pipeline: Pipeline) -> None:
    decoding = start(pipeline.decoder)
    decoding.close()
    with pytest.raises(RuntimeError, match="closed"):
        decoding.step([1, 1, 1], [True] * 3)


@pytest.mark.parametrize(
    ("length", "context", "capacity"), [(1, 2048, 64), (64, 2048, 64), (65, 2048, 128), (65, 100, 100)]
)
def test_capacity(length: int, context: int, capacity: int) -> None:
    assert capacity_for(length, context) == capacity


def test_cache_names_and_shapes() -> None:
    contract = KvCacheContract(num_layers=2, num_heads=3, head_size=8, dtype="float16", shared_buffer=True)
    cache = KvCache.allocate(contract, 4, 64)
    names = [(past, present) for past, present, _ in cache.bindings()]
    assert names[1] == ("past_key_values.0.value", "present.0.value")
    assert [name for name, _ in names] == [f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert all(array.shape == (4, 3, 64, 8) and array.dtype == np.float16 for array in arrays(cache))
    assert cache.holds(4, 64)
    assert not cache.holds(5, 64)
    assert not cache.holds(4, 65)
    assert cache.shape(2) == (2, 3, 64, 8)
