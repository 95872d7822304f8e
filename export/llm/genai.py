"""Decoders through the model builder of onnxruntime-genai.

Its `create_model` reads a Hugging Face directory, so the language model is written as one for a while.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ExportError
from ...models.contract import KvCacheContract
from ..memory import release_memory
from ..passes import PassResult
from ..quiet import quiet_exporters
from .attention import sliding_windows, unknown_attention

if TYPE_CHECKING:
    from ...models.checkpoint import VisionLanguageModel

DECODER = "decoder.onnx"
# Rope types that the builder (0.18.0) computes as transformers does. It takes "linear" too, and then leaves its factor
# out for Llama: logits off by 5 of 6.
_ROPE_TYPES = {"llama": ("default", "llama3")}
_OTHER_ROPE_TYPES = ("default",)
# Symmetric blocks of 64 weights; activations are quantised to INT8 inside the operator (accuracy_level 4), in blocks of
# the same size, which is what makes it fast on CPUs with VNNI. Blocks of 128 are faster still, but rounding the
# activations then moves logits further than the export's check allows.
BLOCK_SIZE = 64
ACCURACY_LEVEL = 4


def accepts(text_config: Any, cache: KvCacheContract) -> str | None:
    """None, or why the builder cannot make this decoder."""
    if cache.head_size % 16:
        return f"head size {cache.head_size}: rotary embedding inside its attention takes multiples of 16"
    widths = (text_config.hidden_size, text_config.intermediate_size, text_config.num_attention_heads * cache.head_size)
    if text_config.vocab_size in (*widths, cache.num_heads * cache.head_size):
        # It finds the LM head by its width, so it would take another projection for it and say nothing.
        return f"vocab_size {text_config.vocab_size} is also the width of another projection"
    rope = (text_config.rope_parameters or {}).get("rope_type", "default")
    known = _ROPE_TYPES.get(text_config.model_type, _OTHER_ROPE_TYPES)
    if rope not in known:
        return f"rope_type {rope!r}; it computes {', '.join(known)}"
    other = unknown_attention(text_config)
    if other is not None:
        return other
    if sliding_windows(text_config):
        # It leaves Mistral's window out, and gives Qwen2's windowed layers a cache of another length.
        return f"sliding_window {text_config.sliding_window}; it computes full attention"
    return None


def build(model: VisionLanguageModel, precision: str, directory: Path) -> tuple[PassResult, ...]:
    """Write `decoder.onnx` and `decoder.onnx.data` into `directory`."""
    scratch = directory / ".builder"
    source, target = scratch / "source", scratch / "target"
    try:
        _write_source(model, source)
        release_memory()
        _create(source, target, scratch / "cache", precision)
        release_memory()
        for name in (DECODER, f"{DECODER}.data"):
            (target / name).replace(directory / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return ()


def _write_source(model: VisionLanguageModel, directory: Path) -> None:
    """The language model alone as a Hugging Face directory, with a tokenizer that only satisfies the builder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    llm: Any = model.load_stage("llm")
    with quiet_exporters(stderr=True):
        llm.save_pretrained(directory)
    Tokenizer(WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")).save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _create(source: Path, target: Path, cache: Path, precision: str) -> None:
    options = ["exclude_embeds=true", "hf_token=false", f"filename={DECODER}"]
    if precision == "int4":
        options += [f"block_size={BLOCK_SIZE}", f"accuracy_level={ACCURACY_LEVEL}"]
    where = (str(source), str(source), str(target), precision, "cpu", str(cache))
    with quiet_exporters(stderr=True):
        # Inside the block, because the import itself sets up logging.
        from onnxruntime_genai.models.builder import (
            create_model,
            parse_extra_options,
        )

        try:
            create_model(*where, **parse_extra_options(*where, options))
        except (NotImplementedError, ValueError, KeyError, AttributeError) as error:
            raise ExportError(
                f"stage llm: onnxruntime-genai cannot build this decoder ({' '.join(str(error).split())}); it needs "
                "another text model or another version of onnxruntime-genai"
            ) from error
