"""The language model of a checkpoint to `decoder.onnx`, whoever builds the graph: one set of inputs and outputs.

Inputs `inputs_embeds`, `attention_mask`, `logits_position` and the cache; output `logits` and the cache, which the run
time binds to the same buffers. Rows are padded on the right, and a row's length is the sum of its mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ...errors import UnsupportedError
from ...models.contract import KvCacheContract, StageContract
from ..passes import PassResult, apply_passes
from ..passes.axes import Dims, NameAxes
from ..passes.lm_head import GatherLogitsPosition
from . import exporters, genai

if TYPE_CHECKING:
    from ...models.checkpoint import VisionLanguageModel


@dataclass(frozen=True)
class LlmGraph:
    """What was written: the builder's name, what the passes did, the default operator set of the graph."""

    builder: str
    passes: tuple[PassResult, ...]
    opset: int


@dataclass(frozen=True)
class _Builder:
    """`build(model, precision, directory)` leaves `decoder.onnx` and its weights in `directory`.

    ``accepts(text_config, cache)``: None, or why it cannot build this text model. ``copies``: FP32 copies of the
    weights that it writes for a while beside the result.
    """

    name: str
    build: Callable[[VisionLanguageModel, str, Path], tuple[PassResult, ...]]
    accepts: Callable[[Any, KvCacheContract], str | None]
    copies: int


_GENAI = _Builder("onnxruntime-genai", genai.build, genai.accepts, copies=1)
_EXPORTERS = _Builder("transformers.exporters", exporters.build, exporters.accepts, copies=0)
# In order of preference.
_BUILDERS: dict[str, tuple[_Builder, ...]] = {
    "gemma": (_GENAI, _EXPORTERS),
    "llama": (_GENAI, _EXPORTERS),
    "mistral": (_GENAI, _EXPORTERS),
    "opt": (_EXPORTERS,),
    "phi": (_EXPORTERS,),
    "phi3": (_EXPORTERS,),
    "qwen2": (_GENAI, _EXPORTERS),
    "qwen2_5_vl_text": (_EXPORTERS,),
    "qwen2_vl_text": (_EXPORTERS,),
}


def export_llm(model: VisionLanguageModel, contract: StageContract, path: Path, *, precision: str) -> LlmGraph:
    """Write the decoder to `path` (its weights beside it as ``<name>.data``); the directory's other files are the
    caller's.

    Raises UnsupportedError when no builder takes the text model, ExportError when a graph does not come out as it
    must.
    """
    cache = model.kv_cache
    if cache is None:
        raise UnsupportedError(f"{model.path}: {model.architecture} has no language model, so there is nothing to run")
    builder = _choose(model.text_config, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = builder.build(model, precision, path.parent)
    graph = ir.load(path)
    shapes = decoder_shapes(contract, cache)
    graph, more = apply_passes(graph, (GatherLogitsPosition(), NameAxes(shapes)), stage=contract.name)
    # Weights stay where the builder wrote them; only the graph is written again.
    ir.save(graph, path)
    return LlmGraph(builder.name, (*done, *more), graph.opset_imports[""])


def scratch_bytes(model: VisionLanguageModel, llm_bytes: int) -> int:
    """Bytes that building the decoder needs for a while, beside the result, for an LLM of `llm_bytes` in FP32."""
    if model.kv_cache is None or "llm_encoder" in model.contracts or "cross_kv" in model.contracts:
        return 0  # traced from the weights as they lie (seq2seq.py, flamingo.py)
    return _choose(model.text_config, model.kv_cache).copies * llm_bytes


def decoder_shapes(contract: StageContract, cache: KvCacheContract) -> dict[str, Dims]:
    """Name -> shape of every input and output: those of the contract and the cache's.

    Past and present are one buffer, so they have one length, `past_sequence`.
    """
    shapes: dict[str, Dims] = {spec.name: spec.shape for spec in (*contract.inputs, *contract.outputs)}
    for layer in range(cache.num_layers):
        for kind in ("key", "value"):
            for name in (cache.past, cache.present):
                shape = ("batch", cache.num_heads, "past_sequence", cache.head_size)
                shapes[name.format(layer=layer, kind=kind)] = shape
    return shapes


def _choose(text_config: Any, cache: KvCacheContract) -> _Builder:
    builders = _BUILDERS.get(text_config.model_type)
    if builders is None:
        raise UnsupportedError(
            f"text model {text_config.model_type!r} has no decoder builder; accepted are {', '.join(_BUILDERS)}"
        )
    reasons = []
    for builder in builders:
        reason = builder.accepts(text_config, cache)
        if reason is None:
            return builder
        reasons.append(f"{builder.name}: {reason}")
    raise UnsupportedError(f"no builder takes this {text_config.model_type} text model ({'; '.join(reasons)})")
