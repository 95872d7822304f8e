"""Decoders through `transformers.exporters`, for what the model builder of onnxruntime-genai does not take.

The exporter traces the model with a cache that grows by concatenation; the passes put ONNX Runtime's
GroupQueryAttention in its place and compute positions from the mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from ...errors import ExportError
from ...models.contract import KvCacheContract
from ..graph import OPSET, drop_weights, fold_constants, save_graph
from ..passes import GraphPass, PassResult, apply_passes
from ..passes.gemm import MatMulFromGemm
from ..passes.gqa import GroupQueryAttention
from ..passes.modules import KeepModuleScopes
from ..passes.positions import PositionsFromMask
from ..passes.weights import TransposeWeights
from ..quiet import quiet_exporters
from .attention import position_axes, sliding_windows, unknown_attention
from .genai import DECODER
from .int4 import quantize_matmuls

if TYPE_CHECKING:
    from ...models.checkpoint import VisionLanguageModel

# Rope types whose frequencies do not depend on how long the prompt is; a trace holds one set of them.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# The traced example: batch, new tokens, cached tokens. All at least 2 and different, so that none is baked in or
# taken for another.
_BATCH, _TOKENS, _PAST = 2, 3, 5


def accepts(text_config: Any, cache: KvCacheContract) -> str | None:
    """None, or why a decoder cannot be made this way."""
    if cache.head_size % 8:
        return f"head size {cache.head_size}: GroupQueryAttention takes multiples of 8"
    rope = (getattr(text_config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        return f"rope_type {rope!r}; a trace holds {', '.join(_ROPE_TYPES)}"
    other = unknown_attention(text_config)
    if other is not None:
        return other
    if text_config.max_position_embeddings < _TOKENS + _PAST:
        return f"max_position_embeddings {text_config.max_position_embeddings} is below {_TOKENS + _PAST}"
    return None


def build(model: VisionLanguageModel, precision: str, directory: Path) -> tuple[PassResult, ...]:
    """Write `decoder.onnx` and `decoder.onnx.data` into `directory`."""
    cache = model.kv_cache
    assert cache is not None
    text = model.text_config
    axes = position_axes(text)
    graph = _trace(model.load_stage("llm"), text, cache, axes)
    weights = tuple(graph.graph.initializers.values())
    rename_cache(graph, cache)
    fold_constants(graph)
    passes: tuple[GraphPass, ...] = (
        KeepModuleScopes(),
        TransposeWeights(),
        MatMulFromGemm(),
        GroupQueryAttention(
            num_layers=cache.num_layers,
            num_heads=text.num_attention_heads,
            kv_heads=cache.num_heads,
            head_size=cache.head_size,
            windows={cache.past.format(layer=i, kind="key"): size for i, size in sliding_windows(text).items()},
        ),
    )
    if axes == 1:
        # With several axes positions are not those of the mask: they stay an input.
        passes = (*passes, PositionsFromMask(text.max_position_embeddings))
    graph, results = apply_passes(graph, passes, stage="llm")
    if precision == "int4":
        graph = quantize_matmuls(graph)
    save_graph(graph, directory / DECODER)
    drop_weights((*weights, *graph.graph.initializers.values()))
    return results


def _trace(llm: Any, text_config: Any, cache: KvCacheContract, position_axes: int) -> ir.Model:
    """The decoder with a growing cache, `inputs_embeds` and explicit `position_ids`.

    The cache has no config, so that layers with a sliding window keep all tokens as the others do.
    """
    from transformers import DynamicCache
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    llm.set_attn_implementation("eager")
    past: Any = DynamicCache()
    states = (_BATCH, cache.num_heads, _PAST, cache.head_size)
    for layer in range(cache.num_layers):
        past.update(torch.randn(states), torch.randn(states), layer)
    positions = torch.arange(_PAST, _PAST + _TOKENS).repeat(_BATCH, 1)
    inputs = {
        "inputs_embeds": torch.randn(_BATCH, _TOKENS, text_config.hidden_size),
        "attention_mask": torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.int64),
        "position_ids": positions if position_axes == 1 else positions.repeat(position_axes, 1, 1),
        "past_key_values": past,
    }
    auto = torch.export.Dim.AUTO
    shapes = {
        "inputs_embeds": {0: auto, 1: auto},
        "attention_mask": {0: auto, 1: auto},
        "position_ids": {0: auto, 1: auto} if position_axes == 1 else {1: auto, 2: auto},
        "past_key_values": [{0: auto, 2: auto}] * (2 * cache.num_layers),
    }
    config = OnnxConfig(opset_version=OPSET, optimize=False, dynamic_shapes=shapes)
    exporter: Any = OnnxExporter  # its constructor is not typed
    try:
        with quiet_exporters():
            traced: tuple[ir.Model, object] = exporter().export_program(llm, inputs, config)
    except RuntimeError as error:
        # torch.export and torch.onnx have many errors, all of them RuntimeErrors, of many lines.
        reason = " ".join(str(error).split())[:200]
        raise ExportError(
            f"stage llm: transformers.exporters cannot trace this {text_config.model_type} model ({reason}); it needs "
            "another text model or another version of transformers"
        ) from error
    return traced[0]


def rename_cache(graph: ir.Model, cache: KvCacheContract) -> None:
    """The exporter's names of the cache's tensors to the contract's, in place."""
    values = {value.name: value for value in (*graph.graph.inputs, *graph.graph.outputs)}
    for layer in range(cache.num_layers):
        for kind in ("key", "value"):
            leaf = f"past_key_values.layers.{layer}.{kind}s"
            values[f"input.{leaf}"].name = cache.past.format(layer=layer, kind=kind)
            values[f"output.{leaf}"].name = cache.present.format(layer=layer, kind=kind)
