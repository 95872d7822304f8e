"""The first Qwen-VL (arXiv 2308.12966) as its project stores it: config and tensor names to those of our stages.

A directory::

    config.json                  model_type "qwen", architecture QWenLMHeadModel, a part "visual"
    model.safetensors            or shards with their index
    qwen.tiktoken                the ranks of the tokenizer
    generation_config.json       chat_format: "raw" (the base model) or "chatml" (Qwen-VL-Chat)

The Python files that come with it (`auto_map`) are not read and not run. Its language model is the architecture of
Qwen2 under other names: one matrix for query, key and value, and an MLP whose gate is w2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import CheckpointError, UnsupportedError
from .foreign import CONFIG, ForeignCheckpoint, read_json
from .lavis import ConvertedWeights, Source, as_stored
from .weights import Weights, open_weights

if TYPE_CHECKING:
    from torch import Tensor

GENERATION_CONFIG = "generation_config.json"
ARCHITECTURE = "QWenLMHeadModel"
CHAT_FORMATS = ("raw", "chatml")
# In the vocabulary behind <|endoftext|>: the marks of a chat's turns.
IM_START, IM_END = 1, 2
# A head of the resampler's attention.
_RESAMPLER_HEAD = 128


class _Visual(BaseModel):
    """The part `visual` of config.json, with the defaults of the project's VisionTransformer."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    image_size: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    width: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    mlp_ratio: float = Field(gt=0)
    output_dim: int = Field(ge=1)
    n_queries: int = Field(default=256, ge=1)
    image_start_id: int = Field(default=151857, ge=0)


class _Config(BaseModel):
    """config.json, with the defaults of the project's QWenConfig."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    visual: _Visual
    vocab_size: int = Field(default=151936, ge=1)
    hidden_size: int = Field(default=4096, ge=1)
    intermediate_size: int = Field(default=22016, ge=2)
    num_hidden_layers: int = Field(default=32, ge=1)
    num_attention_heads: int = Field(default=32, ge=1)
    kv_channels: int = Field(default=128, ge=1)
    layer_norm_epsilon: float = Field(default=1e-6, gt=0)
    rotary_emb_base: float = Field(default=10000.0, gt=0)
    rotary_pct: float = 1.0
    seq_length: int = Field(default=2048, ge=1)
    max_position_embeddings: int = Field(default=8192, ge=1)
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    scale_attn_weights: bool = True
    tie_word_embeddings: bool = False

    @property
    def context(self) -> int:
        """Positions at which the model is Qwen2: dynamic NTK and log-n attention change it beyond `seq_length`."""
        changes = self.use_dynamic_ntk or self.use_logn_attn
        return self.seq_length if changes else self.max_position_embeddings


def read(directory: Path, *, allow_pickle: bool = False) -> ForeignCheckpoint:
    """Open a Qwen-VL directory (see the module's text); no weight is read and no code is run.

    Raises CheckpointError for a config or weights that are not Qwen-VL's, UnsupportedError for the text-only Qwen, a
    quantised one and options that Qwen2 does not have.
    """
    raw, config = _read_config(directory)
    sources = sources_from_qwen(open_weights(directory, allow_pickle=allow_pickle), config.visual.heads)
    files = [directory / name for name in (CONFIG, GENERATION_CONFIG) if (directory / name).is_file()]
    return ForeignCheckpoint("qwen_vl", _convert(directory, raw, config), ConvertedWeights(sources), tuple(files))


def read_config(directory: Path) -> dict[str, Any]:
    """The config alone, as `read` gives it; no weights need be there."""
    return _convert(directory, *_read_config(directory))


def chat_format(directory: Path) -> str:
    """`chat_format` of generation_config.json: "raw" (also where there is no such file) or "chatml".

    Raises UnsupportedError for another one.
    """
    file = directory / GENERATION_CONFIG
    named = read_json(file).get("chat_format", "raw") if file.is_file() else "raw"
    if named not in CHAT_FORMATS:
        raise UnsupportedError(f"{file}: chat_format is {named!r}; accepted are {', '.join(CHAT_FORMATS)}")
    return str(named)


def _read_config(directory: Path) -> tuple[dict[str, Any], _Config]:
    file = directory / CONFIG
    raw = read_json(file)
    if raw.get("visual") is None:
        raise UnsupportedError(
            f"{file}: a {raw.get('model_type')!r} without the part visual is the text-only Qwen; read is Qwen-VL, "
            "which sees pictures"
        )
    try:
        config = _Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{file}: {key}: {first['msg']} (got {first['input']!r:.60}); copy the config.json of the checkpoint again"
        ) from error
    _check(file, raw, config)
    return raw, config


def _check(file: Path, raw: Mapping[str, Any], config: _Config) -> None:
    if raw.get("quantization_config"):
        raise UnsupportedError(
            f"{file}: the checkpoint is quantised (quantization_config); give one stored in float32, float16 or "
            "bfloat16, and quantise on export"
        )
    built = {"no_bias": True, "scale_attn_weights": True, "rotary_pct": 1.0, "tie_word_embeddings": False}
    for key, value in built.items():
        if getattr(config, key) != value:
            raise UnsupportedError(f"{file}: {key} is {getattr(config, key)!r}; built is {value!r}, as published")
    visual = config.visual
    grid, queries = visual.image_size // visual.patch_size, round(visual.n_queries**0.5)
    for wrong, text in (
        (
            config.kv_channels * config.num_attention_heads != config.hidden_size,
            f"{config.num_attention_heads} heads of {config.kv_channels} (kv_channels) do not make the hidden_size "
            f"{config.hidden_size}",
        ),
        (config.intermediate_size % 2, f"intermediate_size {config.intermediate_size} is odd, and is halved"),
        (visual.width % visual.heads, f"visual.heads {visual.heads} does not divide visual.width {visual.width}"),
        (
            visual.output_dim != config.hidden_size,
            f"visual.output_dim is {visual.output_dim} and hidden_size {config.hidden_size}; they are one",
        ),
        (
            visual.output_dim % _RESAMPLER_HEAD,
            f"visual.output_dim {visual.output_dim} is no multiple of {_RESAMPLER_HEAD}, a head of the resampler",
        ),
        (queries**2 != visual.n_queries, f"visual.n_queries {visual.n_queries} is no square"),
        (not grid, f"visual.image_size {visual.image_size} is below visual.patch_size {visual.patch_size}"),
        (visual.image_start_id + 2 >= config.vocab_size, f"visual.image_start_id {visual.image_start_id} is too high"),
    ):
        if wrong:
            raise CheckpointError(f"{file}: {text}; correct it")


def _convert(directory: Path, raw: Mapping[str, Any], config: _Config) -> dict[str, Any]:
    """What `QwenVlConfig` reads."""
    visual = config.visual
    # <ref> and </ref>, <box> and </box>, <quad> and </quad>, then <img>; before these 205 extras and the chat's marks.
    end_of_text = visual.image_start_id - 6 - 205 - 3
    chat = chat_format(directory) == "chatml"
    stops = [end_of_text, end_of_text + IM_END, end_of_text + IM_START] if chat else [end_of_text]
    return {
        "model_type": raw["model_type"],
        "architectures": raw.get("architectures"),
        "image_token_id": visual.image_start_id + 2,
        "image_seq_length": visual.n_queries,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": visual.width,
            "intermediate_size": int(visual.width * visual.mlp_ratio),
            "num_hidden_layers": visual.layers,
            "num_attention_heads": visual.heads,
            "image_size": visual.image_size,
            "patch_size": visual.patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "projection_dim": visual.output_dim,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size // 2,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_attention_heads,
            "rms_norm_eps": config.layer_norm_epsilon,
            "rope_parameters": {"rope_theta": config.rotary_emb_base, "rope_type": "default"},
            "max_position_embeddings": config.context,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": stops,
            "pad_token_id": end_of_text,
        },
    }


_BLOCK = "transformer.h.{i}."
_LAYER = "language_model.model.layers.{i}."
_VISION_BLOCK = "transformer.visual.transformer.resblocks.{i}."
_VISION_LAYER = "vision_model.layers.{i}."


def _thirds(layer: str) -> tuple[str, ...]:
    return tuple(f"{layer}self_attn.{letter}_proj.{{p}}" for letter in "qkv")


# The project's name and ours; {i}: a layer, {p}: what is left. Three names stand for the thirds of a tensor.
_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("transformer.wte.{p}", ("language_model.model.embed_tokens.{p}",)),
    ("transformer.ln_f.{p}", ("language_model.model.norm.{p}",)),
    ("lm_head.{p}", ("language_model.lm_head.{p}",)),
    (_BLOCK + "ln_1.{p}", (_LAYER + "input_layernorm.{p}",)),
    (_BLOCK + "ln_2.{p}", (_LAYER + "post_attention_layernorm.{p}",)),
    (_BLOCK + "attn.c_attn.{p}", _thirds(_LAYER)),
    (_BLOCK + "attn.c_proj.{p}", (_LAYER + "self_attn.o_proj.{p}",)),
    (_BLOCK + "mlp.w1.{p}", (_LAYER + "mlp.up_proj.{p}",)),
    (_BLOCK + "mlp.w2.{p}", (_LAYER + "mlp.gate_proj.{p}",)),
    (_BLOCK + "mlp.c_proj.{p}", (_LAYER + "mlp.down_proj.{p}",)),
    (_VISION_BLOCK + "attn.in_proj.{p}", _thirds(_VISION_LAYER)),
    (_VISION_BLOCK + "attn.out_proj.{p}", (_VISION_LAYER + "self_attn.out_proj.{p}",)),
    (_VISION_BLOCK + "ln_1.{p}", (_VISION_LAYER + "layer_norm1.{p}",)),
    (_VISION_BLOCK + "ln_2.{p}", (_VISION_LAYER + "layer_norm2.{p}",)),
    (_VISION_BLOCK + "mlp.c_fc.{p}", (_VISION_LAYER + "mlp.fc1.{p}",)),
    (_VISION_BLOCK + "mlp.c_proj.{p}", (_VISION_LAYER + "mlp.fc2.{p}",)),
    ("transformer.visual.attn_pool.{p}", ("connector.attn_pool.{p}",)),
    ("transformer.visual.ln_post.{p}", ("connector.ln_post.{p}",)),
    ("transformer.visual.proj", ("connector.proj",)),
    ("transformer.visual.{p}", ("vision_model.{p}",)),
)
# Buffers that older releases stored.
_BUFFERS = re.compile(r"transformer\.(h\.\d+\.attn\.)?(rotary_emb\.inv_freq|masked_bias|bias|logn_tensor)")


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", r"(?P<p>.+)")
    return re.compile(pattern)


_PATTERNS = tuple((_pattern(theirs), ours) for theirs, ours in _NAMES)


def our_names(name: str) -> tuple[str, ...]:
    """Our names of the project's tensor `name`: three for a fused one, itself for one that is none of Qwen-VL's."""
    for pattern, ours in _PATTERNS:
        if match := pattern.fullmatch(name):
            return tuple(one.format(**match.groupdict()) for one in ours)
    return (name,)


def sources_from_qwen(weights: Weights, heads: int) -> dict[str, Source]:
    """A source under our name for every tensor of the project's `weights`; `heads`: of the vision encoder.

    What is none of Qwen-VL's keeps its name, and has no place in the model.
    """
    sources: dict[str, Source] = {}
    for name, entry in weights.entries.items():
        if _BUFFERS.fullmatch(name):
            continue
        names = our_names(name)
        if len(names) == 1:
            sources[names[0]] = as_stored(weights, name)
            continue
        # The language model has all queries first, the vision encoder those of a head, its keys, its values.
        groups = heads if name.startswith("transformer.visual.") else 1
        rows, *rest = entry.shape or (0,)
        for place, ours in enumerate(names):
            sources[ours] = Source(weights, (name,), (rows // 3, *rest), _take_part(groups, place))
    return sources


def _take_part(groups: int, place: int) -> Callable[[list[Tensor]], Tensor]:
    def take(tensors: list[Tensor]) -> Tensor:
        fused = tensors[0]
        parts = fused.reshape(groups, 3, -1, *fused.shape[1:])
        return parts[:, place].reshape(-1, *fused.shape[1:]).contiguous()

    return take
