"""A Flamingo language model to two graphs, `cross_kv` and `llm`: pictures are read once, each token costs one step.

`cross_kv` keeps to standard operators and gives the cross-attention's keys and values; `llm` reads them and has a
cache of its own, as other decoders have (see export.py of this folder).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError
from ...models.contract import KvCacheContract, StageContract
from ...models.flamingo_contract import FlamingoContract
from ..graph import trace_stage
from .export import LlmGraph
from .flamingo_graph import trace_flamingo
from .traced import save_traced, save_traced_decoder

if TYPE_CHECKING:
    from ...models.idefics import FlamingoCrossKv, FlamingoDecoder

# Rope types whose frequencies do not depend on how long the prompt is; a graph holds one table of them.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_flamingo(text: Any) -> None:
    """Raise UnsupportedError for a text config that `llm` cannot be made of."""
    rope = (text.rope_parameters or {}).get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        raise UnsupportedError(f"config.json: rope_type is {rope!r}; accepted are {', '.join(_ROPE_TYPES)}")


def export_cross_kv(stage: FlamingoCrossKv, contract: StageContract, path: Path) -> LlmGraph:
    """Write `cross_kv` to `path` in FP32, its weights beside it as ``<name>.data``.

    Raises ExportError when the graph does not come out as it must.
    """
    traced = trace_stage(stage, contract)
    return save_traced(traced.model, traced.passes, traced.traced_weights, path, "fp32")


def export_flamingo_decoder(
    stage: FlamingoDecoder,
    contract: StageContract,
    cache: KvCacheContract,
    flamingo: FlamingoContract,
    path: Path,
    *,
    precision: str,
) -> LlmGraph:
    """Write `llm` to `path`; ``precision``: "fp32", or "int4" for 4-bit weights. Otherwise as `export_cross_kv`."""
    model = trace_flamingo(stage, contract, cache, flamingo)
    return save_traced_decoder(model, contract, cache, path, precision)
