"""A decoder whose cache grows by concatenation, in the chain: the tokens are those of the cache that is shared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridgeport.bundle import Bundle, write_manifest
from bridgeport.errors import EngineError
from bridgeport.export.passes.standard_decoder import write_standard_decoder
from bridgeport.models.small.pictures import held_out
from bridgeport.runtime import Pipeline
from bridgeport.runtime.kv_cache import KvCache

PROMPTS = ("", "Question: how many shapes are there? Answer:", "Question: what color is it? Answer:")


@pytest.fixture(scope="module")
def concatenated(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's bundle with the standard form of its decoder."""
    path = tmp_path_factory.mktemp("standard") / "bundle"
    shutil.copytree(small_bundle, path)
    source = Bundle.load(small_bundle)
    for file in ("decoder.onnx", "decoder.onnx.data"):
        (path / "llm" / file).unlink()
    write_standard_decoder(source.graph("llm"), path / "llm" / "decoder.onnx")
    assert source.manifest.kv_cache is not None
    cache = source.manifest.kv_cache.model_copy(update={"shared_buffer": False})
    write_manifest(path, source.manifest.model_copy(update={"kv_cache": cache}))
    return path


def tokens_of(bundle: Path) -> list[list[int]]:
    """Of rows of different length, some of which end before others, alone and twice in one pipeline."""
    images = [example.image for example in held_out(3)]
    options: dict[str, Any] = {"max_new_tokens": 24}
    with Pipeline.load(bundle, threads=1) as pipeline:
        rows = [*pipeline.generate(images, PROMPTS, **options), *pipeline.generate(images[::-1], PROMPTS, **options)]
        rows.append(pipeline.generate(images[1], PROMPTS[1], **options))
    return [list(row.token_ids) for row in rows]


def test_tokens_are_those_of_a_shared_cache(small_bundle: Path, concatenated: Path) -> None:
    expected = tokens_of(small_bundle)
    assert len({len(row) for row in expected}) > 1, "rows must end at different steps"
    assert tokens_of(concatenated) == expected


def test_padding_keeps_its_place(concatenated: Path) -> None:
    """Prompts of 2 and 4 tokens: the shorter one's step is the fifth place, and what ended gets none."""
    with Pipeline.load(concatenated, threads=1) as pipeline:
        llm = pipeline.engines["llm"]
        cache: Any = llm.allocate_cache(2, 8)
        width = int(llm.contract.input("inputs_embeds").shape[2])
        mask = (np.arange(4) < np.array([[2], [4]])).astype(np.int64)
        inputs: Any = {"inputs_embeds": np.ones((2, 4, width), np.float32), "attention_mask": mask}
        llm.run({**inputs, "logits_position": np.array([1, 3])}, cache=cache)
        step: Any = {"inputs_embeds": np.ones((2, 1, width), np.float32), "logits_position": np.zeros(2, np.int64)}
        for lengths, added in (([3, 5], [1, 1]), ([3, 6], [0, 1])):
            mask = (np.arange(8) < np.array(lengths)[:, None]).astype(np.int64)
            llm.run({**step, "attention_mask": mask}, cache=cache)
            assert cache.places.held[:, -1].tolist() == added
        assert cache.places.held.tolist() == [[1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1]]
        with pytest.raises(EngineError, match="the cache is of another engine"):
            llm.run({**step, "attention_mask": mask}, cache=KvCache.allocate(cache.contract, 2, 8))
