"""The stages `llm_encoder` and `llm` of a checkpoint with a T5: exported, checked on what was written, recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError
from ...models.contract import KvCacheContract
from ...models.seq2seq_contract import Seq2SeqContract
from ...models.t5 import t5_seq2seq
from ..memory import release_memory
from ..stages import ExportedStage, record_built_stage, stage_file
from .export import LlmGraph
from .seq2seq import export_llm_decoder, export_llm_encoder
from .seq2seq_check import Batches, check_llm_decoder, check_llm_encoder, make_seq2seq_batches

if TYPE_CHECKING:
    from ...models.checkpoint import VisionLanguageModel

Progress = Callable[[str], None]


def export_seq2seq(
    model: VisionLanguageModel, staging: Path, precision: str, say: Progress
) -> tuple[ExportedStage, ExportedStage]:
    """Write both graphs below `staging`; returns what stands in the manifest for `llm_encoder` and `llm`.

    ``precision``: "fp32", or "int4" for 4-bit weights in both. Raises UnsupportedError without a language model,
    ExportError for a graph that misses a check.
    """
    cache = model.kv_cache
    if cache is None:
        raise UnsupportedError(f"{model.path}: {model.architecture} has no language model, so there is nothing to run")
    seq2seq = t5_seq2seq(model.text_config)
    encoder, decoder = (staging / stage_file(name) for name in ("llm_encoder", "llm"))
    say(f"llm_encoder and llm: exporting ({precision})")
    graphs = _export(model, cache, seq2seq, encoder, decoder, precision)
    say("llm_encoder and llm: running PyTorch")
    batches = _run_pytorch(model, (encoder, decoder) if precision == "int4" else None)
    release_memory()
    say("llm_encoder and llm: checking")
    cross = seq2seq.cross_cache
    return (
        record_built_stage(
            model,
            "llm_encoder",
            encoder,
            graphs[0],
            check_llm_encoder(encoder, batches, cross, precision=precision),
            precision,
        ),
        record_built_stage(
            model,
            "llm",
            decoder,
            graphs[1],
            check_llm_decoder(decoder, batches, cache, cross, precision=precision),
            precision,
        ),
    )


def _export(
    model: VisionLanguageModel,
    cache: KvCacheContract,
    seq2seq: Seq2SeqContract,
    encoder: Path,
    decoder: Path,
    precision: str,
) -> tuple[LlmGraph, LlmGraph]:
    """One stage after the other; the PyTorch module of the first is gone before that of the second is there."""
    module: Any = model.load_stage("llm_encoder")
    first = export_llm_encoder(module, model.contracts["llm_encoder"], encoder, precision=precision)
    del module
    release_memory()
    module = model.load_stage("llm")
    second = export_llm_decoder(module, model.contracts["llm"], cache, seq2seq, decoder, precision=precision)
    del module
    release_memory()
    return first, second


def _run_pytorch(model: VisionLanguageModel, quantized: tuple[Path, Path] | None) -> Batches:
    encoder: Any = model.load_stage("llm_encoder")
    decoder: Any = model.load_stage("llm")
    embed_tokens = model.load_stage("embed_tokens")
    return make_seq2seq_batches(embed_tokens, encoder, decoder, model.text_config, quantized=quantized)
