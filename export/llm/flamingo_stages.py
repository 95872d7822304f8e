"""The stages `cross_kv` and `llm` of a Flamingo checkpoint: exported, checked on what was written, recorded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.contract import KvCacheContract
from ...models.flamingo_contract import FlamingoContract
from ..memory import release_memory
from ..stages import ExportedStage, Progress, record_built_stage, stage_file
from .export import LlmGraph
from .flamingo import check_flamingo, export_cross_kv, export_flamingo_decoder
from .flamingo_check import Batches, check_cross_kv, check_flamingo_decoder, make_flamingo_batches

if TYPE_CHECKING:
    from ...models.checkpoint import VisionLanguageModel


def export_flamingo(
    model: VisionLanguageModel,
    cache: KvCacheContract,
    contract: FlamingoContract,
    staging: Path,
    precision: str,
    say: Progress,
) -> list[ExportedStage]:
    """Write both graphs below `staging`; returns what stands in the manifest for `cross_kv` and `llm`.

    ``precision``: that of `llm`; `cross_kv` stays FP32. Raises UnsupportedError for rotary embeddings that no table
    holds, ExportError for a graph that misses a check.
    """
    check_flamingo(model.text_config)
    cross, decoder = (staging / stage_file(name) for name in ("cross_kv", "llm"))
    say(f"cross_kv and llm: exporting ({precision})")
    graphs = _export(model, cache, contract, cross, decoder, precision)
    say("cross_kv and llm: running PyTorch")
    batches = _run_pytorch(model, contract, decoder if precision == "int4" else None)
    release_memory()
    say("cross_kv and llm: checking")
    equal = check_flamingo_decoder(decoder, batches, cache, contract, precision=precision)
    return [
        record_built_stage(model, "cross_kv", cross, graphs[0], check_cross_kv(cross, batches, contract), "fp32"),
        record_built_stage(model, "llm", decoder, graphs[1], equal, precision),
    ]


def _export(
    model: VisionLanguageModel,
    cache: KvCacheContract,
    contract: FlamingoContract,
    cross: Path,
    decoder: Path,
    precision: str,
) -> tuple[LlmGraph, LlmGraph]:
    """One stage after the other; the PyTorch module of the first is gone before that of the second is there."""
    module: Any = model.load_stage("cross_kv")
    first = export_cross_kv(module, model.contracts["cross_kv"], cross)
    del module
    release_memory()
    module = model.load_stage("llm")
    second = export_flamingo_decoder(module, model.contracts["llm"], cache, contract, decoder, precision=precision)
    del module
    release_memory()
    return first, second


def _run_pytorch(model: VisionLanguageModel, contract: FlamingoContract, quantized: Path | None) -> Batches:
    cross_kv: Any = model.load_stage("cross_kv")
    decoder: Any = model.load_stage("llm")
    return make_flamingo_batches(cross_kv, decoder, contract, quantized=quantized)
