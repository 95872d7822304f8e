"""A T5 language model to two graphs, `llm_encoder` and `llm`: the prompt is read once, and each token costs one step.

`llm_encoder` keeps to standard operators and gives the cross-attention's keys and values; `llm` reads them and has a
cache of its own, as other decoders have (see export.py of this folder).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ...models.contract import KvCacheContract, StageContract
from ...models.seq2seq_contract import Seq2SeqContract
from ..graph import trace_stage
from .dequantize import dequantize_into
from .export import LlmGraph
from .seq2seq_graph import trace_decoder
from .traced import save_traced, save_traced_decoder

if TYPE_CHECKING:
    from ...models.t5 import T5LanguageDecoder, T5LanguageEncoder


def export_llm_encoder(stage: T5LanguageEncoder, contract: StageContract, path: Path, *, precision: str) -> LlmGraph:
    """Write `llm_encoder` to `path`, its weights beside it as ``<name>.data``.

    ``precision``: "fp32", or "int4" for 4-bit weights. Raises ExportError when the graph does not come out as it must.
    """
    traced = trace_stage(stage, contract)
    return save_traced(traced.model, traced.passes, traced.traced_weights, path, precision)


def export_llm_decoder(
    stage: T5LanguageDecoder,
    contract: StageContract,
    cache: KvCacheContract,
    seq2seq: Seq2SeqContract,
    path: Path,
    *,
    precision: str,
) -> LlmGraph:
    """Write `llm` to `path`; otherwise as `export_llm_encoder`."""
    model = trace_decoder(stage, contract, cache, seq2seq.cross_cache)
    return save_traced_decoder(model, contract, cache, path, precision)


def dequantize_into_t5(model: Any, encoder: Path, decoder: Path) -> None:
    """Give transformers' T5ForConditionalGeneration `model` the weights that both 4-bit graphs hold, in place.

    Raises ExportError when a graph holds what the model has no place for.
    """
    attentions = [block.layer[1].EncDecAttention for block in model.decoder.block]
    view = nn.Module()  # the modules under the names of T5LanguageEncoder
    view.encoder = model.encoder
    view.cross = nn.ModuleList(nn.ModuleDict({"k": one.k, "v": one.v}) for one in attentions)
    dequantize_into(view, encoder)
    dequantize_into(model, decoder)
