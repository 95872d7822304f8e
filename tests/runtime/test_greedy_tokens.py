"""Greedy tokens are those of `transformers.generate`, whatever the text model's shape, in batches of 1 and 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.checkpoints import write_blip2_checkpoint
from tests.runtime.generation import NEW_TOKENS, PROMPTS, Transformers, language_model_pipeline, pictures

from bridgeport.runtime import Pipeline

# 10 Llama and 10 OPT shapes, each unlike the others, over encoders and Q-Formers of different shapes too.
LLAMA: tuple[dict[str, Any], ...] = (
    {"num_kv_heads": 2, "tie": True},
    {"num_kv_heads": 1, "head_dim": 24, "num_query_tokens": 7, "rope_theta": 500.0},
    {"num_layers": 3, "num_heads": 2, "intermediate_size": 40, "vision_layers": 1},
    {"hidden_size": 48, "num_heads": 3, "num_kv_heads": 3, "eos_token_id": [2, 40, 200]},
    {"num_layers": 1, "head_dim": 8, "cross_attention_frequency": 1},
    {"hidden_size": 32, "num_heads": 4, "tie": True, "image_size": 42},
    {"num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "rope_theta": 1e6, "qformer_layers": 2},
    {"max_position_embeddings": 96, "num_query_tokens": 1, "qkv_bias": False},
    {"num_layers": 4, "intermediate_size": 160, "num_kv_heads": 4, "vision_hidden_size": 48, "vision_heads": 4},
    {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 2, "extra_vocab": 0, "resample": 2},
)
OPT: tuple[dict[str, Any], ...] = (
    {},
    {"tie": False, "num_heads": 2, "num_layers": 3, "num_query_tokens": 1},
    {"do_layer_norm_before": False},
    {"hidden_size": 32, "num_heads": 4, "qformer_hidden_size": 32, "qformer_heads": 4},
    {"num_layers": 1, "intermediate_size": 40, "patch_size": 7},
    {"hidden_size": 48, "num_heads": 3, "eos_token_id": [2, 41, 77]},
    # Its default seed, 106, makes transformers itself answer two of the rows alike.
    {"num_heads": 8, "num_query_tokens": 7, "cross_attention_frequency": 3, "seed": 116},
    {"max_position_embeddings": 96, "intermediate_size": 160, "do_normalize": False},
    {"num_layers": 4, "tie": False, "qformer_layers": 1, "cross_attention_frequency": 1},
    {"hidden_size": 96, "num_heads": 6, "extra_vocab": 0, "vision_intermediate_size": 64},
)
CASES = [
    pytest.param(text, {"seed": 100 + index} | options, id=f"{text}-{index}")
    for text, configs in (("llama", LLAMA), ("opt", OPT))
    for index, options in enumerate(configs)
]


@pytest.mark.parametrize(("text", "options"), CASES[:3] + CASES[10:13])
def test_language_model_tokens_equal_transformers(text: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """The exported language model behind PyTorch's encoder and connector."""
    checkpoint = write_blip2_checkpoint(tmp_path / "checkpoint", text=text, **options)
    with language_model_pipeline(checkpoint, tmp_path / "llm") as pipeline:
        check_greedy(pipeline, Transformers(checkpoint))


@pytest.mark.slow
@pytest.mark.parametrize(("text", "options"), CASES)
def test_chain_tokens_equal_transformers(
    text: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole chain exported."""
    from bridgeport.export import checkpoint as export

    monkeypatch.setattr(export, "lint_stages", lambda *_: None)  # takes half the time, and has tests of its own
    checkpoint = write_blip2_checkpoint(tmp_path / "checkpoint", text=text, **options)
    export.export_checkpoint(checkpoint, tmp_path / "bundle")
    with Pipeline.load(tmp_path / "bundle", threads=1) as pipeline:
        check_greedy(pipeline, Transformers(checkpoint))


def check_greedy(pipeline: Pipeline, reference: Transformers) -> None:
    """Batch 1 and batch 3, each against transformers run the same way."""
    images = pictures()
    alone = [reference.generate([image], [prompt])[0] for image, prompt in zip(images, PROMPTS, strict=True)]
    assert len({tuple(row) for row in alone}) == len(alone), "rows must differ, or their order is not seen"
    for image, prompt, expected in zip(images, PROMPTS, alone, strict=True):
        assert list(pipeline.generate(image, prompt, max_new_tokens=NEW_TOKENS).token_ids) == expected
    batch = pipeline.generate(images, PROMPTS, max_new_tokens=NEW_TOKENS)
    assert [list(row.token_ids) for row in batch] == alone == reference.generate(images, PROMPTS)
