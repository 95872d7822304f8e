"""Prompts with pictures for other LLM engines: everything up to the language model, in the form that they take.

vLLM takes the prompt's embeddings as a tensor (`prompt_embeds`). TensorRT-LLM and TensorRT-Edge-LLM take token ids and
a table of extra embeddings: id `vocab_size + i` stands for row `i` of the table. docs/tensorrt.md has the sources.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .._version import __version__
from ..bundle import Bundle, check_output, is_within, output_errors, staged_directory
from ..errors import EngineError, InputError, OutputError, UnsupportedError
from .backends import EngineOptions, load_engines
from .engine import Arrays, Call, Engine
from .kv_cache import KvCache
from .mrope import takes_positions
from .pipeline import Pipeline
from .tensor_files import FLOAT_TYPES, FloatType, cast_floats, safetensors_file, torch_file

if TYPE_CHECKING:
    from .pipeline import Picture

Format = Literal["vllm", "vllm-request", "tensorrt-llm"]
FORMATS: tuple[Format, ...] = ("vllm", "vllm-request", "tensorrt-llm")


@dataclass(frozen=True)
class PromptEmbeddings:
    """One prompt with its pictures, ready for a language model.

    `inputs_embeds` `[S, D]`: the prompt's embeddings, features in place. `input_ids` int64 `[S]`: its tokens,
    `image_token_id` where a feature stands. `image_positions` int64 `[T]`: those places. `image_features`: `[Ti, D]`
    per picture, in prompt order; together `T` rows. `vocab_size`: of the language model.
    """

    inputs_embeds: NDArray[Any]
    input_ids: NDArray[np.int64]
    image_positions: NDArray[np.int64]
    image_features: tuple[NDArray[Any], ...]
    vocab_size: int


@dataclass(frozen=True)
class PromptTable:
    """A prompt for a language model with prompt tuning (p-tuning) inputs.

    `input_ids` int32 `[1, S]`: an id from `vocab_size` up is row `id - vocab_size` of the table. `table` `[1, T, D]`:
    one task's rows. `tasks` int32 `[1, S]`: which task each token reads. `extra_ids` int64 `[1, S]`: what tells two
    tables apart where prefixes are reused (0: an ordinary token).
    """

    input_ids: NDArray[np.int32]
    table: NDArray[Any]
    tasks: NDArray[np.int32]
    extra_ids: NDArray[np.int64]


class _Absent(Engine):
    """The language model's contract without its weights, which the other engine has."""

    def close(self) -> None:
        """Nothing is held."""

    def allocate_cache(self, batch: int, capacity: int) -> KvCache:
        raise EngineError(f"{self.contract.name}: not loaded; this pipeline only embeds prompts")

    def _bind(self, inputs: Arrays, outputs: Arrays, cache: KvCache | None) -> Call:
        raise EngineError(f"{self.contract.name}: not loaded; this pipeline only embeds prompts")


def load_embedder(bundle: str | Path | Bundle, *, device: str = "cpu", threads: int | None = None) -> Pipeline:
    """A pipeline for `embed_prompt`: every stage of the bundle but the language model.

    Raises what `Pipeline.load` does; UnsupportedError for a model whose pictures are no prompt embeddings.
    """
    verified = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    _check_supported(verified)
    stages = verified.manifest.stages
    kept = tuple(stage for stage in stages if stage.contract.name != "llm")
    part = Bundle(verified.path, verified.manifest.model_copy(update={"stages": kept}))
    options = EngineOptions(device, threads)
    llm = verified.manifest.stage("llm").contract
    return Pipeline(verified, {**load_engines("onnxruntime", part, options), "llm": _Absent(llm)}, options)


def embed_prompt(
    pipeline: Pipeline, images: Picture | Sequence[Picture] | None, prompt: str = "", *, interleave: bool = False
) -> PromptEmbeddings:
    """`prompt` with all of `images` in front of it, or with `interleave` at its `{image}` marks.

    Raises InputError for a picture or prompt that cannot be used, UnsupportedError as `load_embedder`, EngineError when
    a stage fails.
    """
    _check_supported(pipeline.bundle)
    several = isinstance(images, Sequence) and not isinstance(images, str)
    group: list[Any] = [] if images is None else list(images) if several else [images]  # type: ignore[arg-type]
    prepared = pipeline.prepare([group], prompt, interleave=interleave)
    pictures = prepared.pictures[0]
    connected = pipeline.vision.connect(pictures, pipeline.vision.encode(pictures)) if pictures else []
    features = [pipeline.vision.arrange(*one) for one in zip(pictures, connected, strict=True)]
    width = int(pipeline.engines["connector"].contract.outputs[0].shape[-1])
    rows = np.concatenate([np.zeros((0, width), np.float32), *features])
    inputs_embeds, _ = pipeline.merge(prepared, [rows])
    ids, positions = prepared.input_ids[0], prepared.image_positions[0]
    return PromptEmbeddings(inputs_embeds[0], ids, positions, tuple(features), pipeline.generation.vocab_size)


def prompt_table(embeddings: PromptEmbeddings, dtype: FloatType = "float32") -> PromptTable:
    """The prompt as token ids and a table. `dtype` as in `cast_floats`.

    Raises InputError when a token of the text is not in the vocabulary: its id would read the table.
    """
    ids, positions, vocabulary = embeddings.input_ids.copy(), embeddings.image_positions, embeddings.vocab_size
    text = np.delete(ids, positions)
    if len(text) and int(text.max()) >= vocabulary:
        raise InputError(
            f"token {int(text.max())} of the prompt is beyond the language model's vocabulary of {vocabulary}, where "
            "ids stand for rows of the table; take the token out of the prompt"
        )
    ids[positions] = vocabulary + np.arange(len(positions))
    rows = embeddings.inputs_embeds[positions]
    extra = np.zeros(len(ids), np.int64)
    extra[positions] = int.from_bytes(hashlib.sha256(rows.tobytes()).digest()[:7], "little") or 1
    small = ids.astype(np.int32)[None]
    return PromptTable(small, cast_floats(rows, dtype)[None], np.zeros_like(small), extra[None])


def vllm_tensor(embeddings: PromptEmbeddings, dtype: FloatType = "float32") -> bytes:
    """`[S, D]` as `torch.save` writes it: `LLM.generate({"prompt_embeds": torch.load(...)})`."""
    return torch_file(cast_floats(embeddings.inputs_embeds, dtype), dtype)


def vllm_request(
    embeddings: PromptEmbeddings, model: str, dtype: FloatType = "float32", max_tokens: int = 64
) -> dict[str, Any]:
    """The body of `POST /v1/completions` for `vllm serve MODEL --enable-prompt-embeds`; greedy."""
    encoded = base64.b64encode(vllm_tensor(embeddings, dtype)).decode("ascii")
    return {"model": model, "prompt_embeds": encoded, "max_tokens": max_tokens, "temperature": 0}


def check_request(form: str, dtype: str, model: str = "") -> tuple[Format, FloatType]:
    """`form` and `dtype` as they are meant, before anything is computed. InputError for what cannot be written."""
    forms = {known: known for known in FORMATS}
    types = {known: known for known in FLOAT_TYPES}
    if form not in forms:
        raise InputError(f"format {form!r} is unknown; accepted are {', '.join(FORMATS)}")
    if dtype not in types:
        raise InputError(f"dtype {dtype!r} is unknown; accepted are {', '.join(FLOAT_TYPES)}")
    if form == "vllm-request" and not model:
        raise InputError("format vllm-request names the served model; give --model")
    if form == "tensorrt-llm" and dtype == "bfloat16":
        raise InputError("dtype 'bfloat16': numpy files have no such type; write float32, TensorRT-LLM casts it")
    return forms[form], types[dtype]


def check_target(out: str | Path, form: Format, *, force: bool = False, protect: Sequence[Path] = ()) -> Path:
    """`out`, absolute. OutputError for a place that `write_prompt` would refuse, before anything is computed.

    `protect`: bundle and pictures that are read; `out` may neither replace one nor lie in it.
    """
    target = Path(out).absolute()
    for kept in protect:
        if is_within(target, kept):
            raise OutputError(f"{target} would change {kept}, which is read; name another place")
    if form == "tensorrt-llm":
        check_output(target, force=force, protect=tuple(protect))
        return target
    with output_errors(target):
        if target.is_dir():
            raise OutputError(f"{target} is a directory; name a file")
        if target.exists() and not force:
            raise OutputError(f"{target} exists; name another file, or replace it with --force")
    return target


def write_prompt(
    embeddings: PromptEmbeddings,
    out: str | Path,
    form: Format,
    *,
    dtype: FloatType = "float32",
    model: str = "",
    max_tokens: int = 64,
    force: bool = False,
    protect: Sequence[Path] = (),
) -> Path:
    """Write the prompt to `out`: a file for vLLM, a directory for TensorRT-LLM.

    `model`: the name under which vLLM serves it, for "vllm-request". `protect`: as in `check_target`. Raises InputError
    for an unknown form or type, OutputError when `out` exists (without `force`) or cannot be written.
    """
    form, dtype = check_request(form, dtype, model)
    target = check_target(out, form, force=force, protect=protect)
    if form == "tensorrt-llm":
        _write_tables(embeddings, target, dtype, force)
    elif form == "vllm":
        _write_file(target, vllm_tensor(embeddings, dtype))
    else:
        body = json.dumps(vllm_request(embeddings, model, dtype, max_tokens)) + "\n"
        _write_file(target, body.encode())
    return target


def _write_tables(embeddings: PromptEmbeddings, target: Path, dtype: FloatType, force: bool) -> None:
    found = prompt_table(embeddings, dtype)
    arrays = {"input_ids": found.input_ids, "prompt_table": found.table, "prompt_tasks": found.tasks}
    arrays["input_token_extra_ids"] = found.extra_ids
    pictures = {f"image.{at}": (cast_floats(rows, dtype), dtype) for at, rows in enumerate(embeddings.image_features)}
    facts = {
        "bridgeport_version": __version__,
        "vocab_size": embeddings.vocab_size,
        "prompt_vocab_size": found.table.shape[1],
        "hidden_size": found.table.shape[2],
        "dtype": dtype,
        "token_ids": embeddings.input_ids.tolist(),
        "image_positions": embeddings.image_positions.tolist(),
        "image_tokens": [len(rows) for rows in embeddings.image_features],
    }
    with staged_directory(target, force=force) as staging:
        for name, values in arrays.items():
            np.save(staging / f"{name}.npy", values, allow_pickle=False)
        # TensorRT-LLM's run.py drops padding tokens from a .npy, also those that a prompt holds; not from a .csv.
        np.savetxt(staging / "input_ids.csv", found.input_ids, fmt="%d", delimiter=",")
        (staging / "image_features.safetensors").write_bytes(safetensors_file(pictures, {"format": "pt"}))
        (staging / "prompt.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _write_file(target: Path, data: bytes) -> None:
    partial = target.with_name(f".{target.name}.partial")
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def _check_supported(bundle: Bundle) -> None:
    manifest = bundle.manifest
    names = {stage.contract.name for stage in manifest.stages}
    if manifest.flamingo is not None:
        why = "its pictures are read by cross-attention and are no prompt embeddings"
    elif manifest.seq2seq is not None:
        why = "its language model has an encoder of its own, which takes no prompt embeddings there"
    elif "llm" in names and takes_positions(manifest.stage("llm").contract):
        why = "its positions follow the pictures (M-RoPE), and prompt embeddings carry none"
    else:
        return
    raise UnsupportedError(f"{bundle.path} cannot be handed to another LLM engine: {why}; use `bridgeport run`")
