"""Flamingo in the form of Idefics (Alayrac et al. 2022, arXiv 2204.14198; Laurençon et al. 2023, arXiv 2306.16527).

Pictures do not stand among the prompt's embeddings: a Perceiver Resampler makes latents of each, and layers of
cross-attention between those of the language model read them, behind a gate `tanh(alpha)`. Keys and values of the
latents do not change while an answer is written, so a stage of their own, `cross_kv`, computes them once.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError
from .contract import Axis, KvCacheContract, StageContract, TensorSpec
from .flamingo_contract import IMAGE_SEQUENCE, FlamingoContract
from .language import batch_axis, float_spec, language_contracts
from .perceiver import PerceiverConfig, PerceiverResampler, idefics_names
from .seq2seq_contract import CrossCacheContract
from .stages import Layout, Stage
from .t5 import attend, rms_norm, split_heads

# Added to the scores of latents that a token does not see: within FP16, and e to the power of it is 0.
MASKED = -1e4
MAX_IMAGES = 64
VISION_MODEL = "model.vision_model."
RESAMPLER = "model.perceiver_resampler."
EMBEDDING = "model.embed_tokens."
CROSS_LAYERS = "model.gated_cross_attn_layers."


class IdeficsEncoder(nn.Module):
    """transformers' `IdeficsVisionTransformer`, with eager attention and without its pooled output."""

    def __init__(self, vision_config: Any) -> None:
        super().__init__()
        from transformers.models.idefics.vision import IdeficsVisionTransformer

        config = copy.deepcopy(vision_config)
        config._attn_implementation = "eager"
        make: Any = IdeficsVisionTransformer
        self.model = make(config)
        del self.model.post_layernorm

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` `[B, 3, H, W]` to `image_embeds` `[B, N, Dv]`; no final LayerNorm is applied."""
        x: Tensor = self.model.pre_layrnorm(self.model.embeddings(pixel_values))
        for layer in self.model.encoder.layers:
            x = layer(x, None)
        return x


class DecoupledEmbedding(nn.Module):
    """Two tables, one behind the other: the language model's words, and those that were added for pictures."""

    def __init__(self, size: int, additional_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width).normal_())
        if additional_size:
            self.additional_embedding = nn.Embedding(additional_size, width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`input_ids` int64 `[B, S]` to `inputs_embeds` `[B, S, D]`."""
        if not hasattr(self, "additional_embedding"):
            return F.embedding(input_ids, self.weight)
        # Two look-ups and a choice: joining the tables would copy them.
        size = self.weight.shape[0]
        words = F.embedding(input_ids.clamp(max=size - 1), self.weight)
        added = self.additional_embedding((input_ids - size).clamp(min=0))
        return torch.where((input_ids < size)[..., None], words, added)


class FlamingoCrossKv(nn.Module):
    """The projections of every cross-attention layer to keys and values.

    `layers[i]` holds `k_proj` and `v_proj`, and `k_layer_norm` with `qk_layer_norms`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.idefics.modeling_idefics import IdeficsRMSNorm

        norm: Any = IdeficsRMSNorm
        width, heads = config.hidden_size, config.num_attention_heads
        self.num_heads: int = heads
        self.layers = nn.ModuleList()
        for _ in range(config.num_hidden_layers // config.cross_layer_interval):
            layer = {
                name: nn.Linear(config.vision_config.embed_dim, width, bias=False) for name in ("k_proj", "v_proj")
            }
            if config.qk_layer_norms:
                layer["k_layer_norm"] = norm(width // heads, eps=config.rms_norm_eps)
            self.layers.append(nn.ModuleDict(layer))

    def forward(self, image_features: Tensor) -> tuple[Tensor, ...]:
        """`image_features` `[B, K, Dv]`, the latents of all pictures of each row in turn, zeros where it has fewer.

        Returns key and value of each cross-attention layer in turn, `[B, heads, K, head_size]`.
        """
        found = []
        for layer in self.layers:
            parts: Any = layer
            key, value = (split_heads(parts[name](image_features), self.num_heads) for name in ("k_proj", "v_proj"))
            found += [rms_norm(parts["k_layer_norm"], key) if "k_layer_norm" in parts else key, value]
        return tuple(found)


class FlamingoDecoder(nn.Module):
    """The language model with its cross-attention layers and head, without what `FlamingoCrossKv` computes.

    It has no `forward`: its caches are an engine's (see export/llm/flamingo_graph.py).
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.idefics import modeling_idefics as idefics

        parts: Any = idefics
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
        config.alpha_initializer = "zeros"  # what a gate starts from does not matter to weights that are read
        self.config = config
        self.layers = nn.ModuleList(parts.IdeficsDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.gated_cross_attn_layers = nn.ModuleList(
            parts.IdeficsGatedCrossAttentionLayer(config, i)
            for i in range(config.num_hidden_layers // config.cross_layer_interval)
        )
        for layer in self.gated_cross_attn_layers:
            cross: Any = layer.cross_attn
            for name in ("k_proj", "v_proj", *(("k_layer_norm",) if config.qk_layer_norms else ())):
                delattr(cross, name)
        self.norm = parts.IdeficsRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = parts.IdeficsDecoupledLinear(
            config.hidden_size, config.vocab_size, config.additional_vocab_size, bias=False
        )

    def rotary_tables(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[context, head_size / 2]` for every position, from transformers' own rotary embedding."""
        rotary: Any = self.layers[0].self_attn.rotary_emb  # type: ignore[union-attr]  # an IdeficsAttention
        positions = torch.arange(self.config.max_position_embeddings)[None]
        cos, sin = rotary(torch.zeros(1), positions)
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def picture_mask(image_attention_mask: Tensor, latents: int) -> tuple[Tensor, Tensor]:
    """Which pictures a token sees, int64 `[B, S, images]`, as every cross-attention layer takes it.

    Returns what is added to the scores, `[B, 1, S, images * latents]`, and `[B, S, 1]`, 0 for a token that sees none.
    """
    seen = image_attention_mask.float()
    bias = ((1.0 - seen) * MASKED)[..., None].expand(-1, -1, -1, latents).flatten(2)[:, None]
    return bias, seen.amax(dim=2, keepdim=True)


def cross_attend(layer: Any, hidden: Tensor, cross: list[Tensor], bias: Tensor, gate: Tensor) -> Tensor:
    """A `IdeficsGatedCrossAttentionLayer` on keys and values that are computed already.

    `hidden` `[B, S, D]`; `cross`: key and value `[B, heads, images * latents, head_size]`; `bias`, `gate`: see
    `picture_mask`. A token that sees no picture gets nothing of the attention, as in transformers, and its feed-forward
    runs all the same.
    """
    attention = layer.cross_attn
    query = split_heads(attention.q_proj(rms_norm(layer.input_layernorm, hidden)), attention.num_heads)
    if attention.qk_layer_norms:
        query = rms_norm(attention.q_layer_norm, query)
    attended = attention.o_proj(attend(query * attention.scaling, cross[0], cross[1], bias))
    hidden = hidden + torch.tanh(layer.alpha_cross_attn) * (attended * gate)
    return hidden + torch.tanh(layer.alpha_dense) * feed_forward(layer, hidden)


def feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    """The gated MLP of either kind of layer behind its norm, without the residual."""
    output: Tensor = layer.mlp(rms_norm(layer.post_attention_layernorm, hidden))
    return output


def vision_text_to_text(config: Any) -> Layout:
    """`IdeficsForVisionText2Text` in the stages encoder, connector, embed_tokens, cross_kv and llm."""
    _check(config)
    vision, perceiver = config.vision_config, PerceiverConfig.from_idefics(config)
    text = text_config(config)
    names = {ours: RESAMPLER + theirs for ours, theirs in idefics_names(perceiver).items()}
    return Layout(
        kind="flamingo",
        stages={
            "encoder": Stage(
                lambda: IdeficsEncoder(vision),
                lambda name: VISION_MODEL + name.removeprefix("model."),
                finish=_fill_position_ids,
            ),
            "connector": Stage(lambda: PerceiverResampler(perceiver), names.__getitem__),
            "embed_tokens": Stage(
                lambda: DecoupledEmbedding(config.vocab_size, config.additional_vocab_size, config.hidden_size),
                lambda name: EMBEDDING + name,
            ),
            "cross_kv": Stage(lambda: FlamingoCrossKv(config), _cross_kv_name),
            "llm": Stage(lambda: FlamingoDecoder(config), _decoder_name, finish=_make_rotary),
        },
        contracts=_contracts(config, text, perceiver),
        kv_cache=flamingo_kv_cache(config),
        text_config=text,
        ignored=_ignored(config),
        tied=_tied(config),
    )


def text_config(config: Any) -> Any:
    """`config` for callers that count words: those that were added are in `vocab_size`."""
    text = copy.deepcopy(config)
    text.vocab_size, text.additional_vocab_size = config.vocab_size + config.additional_vocab_size, 0
    return text


def cross_cache(config: Any) -> CrossCacheContract:
    """Keys and values of a row's latents, a pair for each cross-attention layer."""
    return CrossCacheContract(
        num_layers=config.num_hidden_layers // config.cross_layer_interval,
        num_heads=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        dtype="float32",
    )


def flamingo_kv_cache(config: Any) -> KvCacheContract:
    """The cache of self-attention; GroupQueryAttention takes head sizes in eights, so others are padded with zeros."""
    size = config.hidden_size // config.num_attention_heads
    return KvCacheContract(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        head_size=-(-size // 8) * 8,
        dtype="float32",
        shared_buffer=True,
    )


def flamingo_contract(config: Any, end_of_document_id: int | None) -> FlamingoContract:
    """For the manifest; `end_of_document_id`: the tokenizer's EOS."""
    return FlamingoContract(
        cross_cache=cross_cache(config),
        latents=config.perceiver_config.resampler_n_latents,
        max_images=MAX_IMAGES,
        end_of_document_id=end_of_document_id,
    )


def reference_idefics(decoder: FlamingoDecoder, cross_kv: FlamingoCrossKv) -> Any:
    """transformers' IdeficsForVisionText2Text over the very modules of the two stages, no weight copied.

    It takes `inputs_embeds`, `perceiver_embeddings` and `image_attention_mask`. `decoder` gets what it left to
    `cross_kv`.
    """
    from transformers import IdeficsForVisionText2Text

    with torch.device("meta"):
        model: Any = IdeficsForVisionText2Text(decoder.config)
    inner = model.model
    del inner.vision_model, inner.perceiver_resampler
    for layer, parts in zip(decoder.gated_cross_attn_layers, cross_kv.layers, strict=True):
        for name, part in parts.items():  # type: ignore[operator]  # a ModuleDict
            setattr(layer.cross_attn, name, part)
    inner.layers, inner.gated_cross_attn_layers = decoder.layers, decoder.gated_cross_attn_layers
    inner.norm, model.lm_head = decoder.norm, decoder.lm_head
    return model.eval()


def _check(config: Any) -> None:
    if not config.use_resampler:
        raise UnsupportedError(
            "config.json: use_resampler is false, so cross-attention reads every patch of a picture; accepted are "
            "Idefics checkpoints with a Perceiver Resampler (use_resampler true)"
        )
    layers, interval = config.num_hidden_layers, config.cross_layer_interval
    if interval < 1 or layers % interval:
        raise CheckpointError(
            f"config.json: cross_layer_interval {interval} does not divide num_hidden_layers {layers}; transformers "
            "has no cross-attention layer for the rest"
        )
    vision = config.vision_config
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise CheckpointError(
                f"config.json: vision_config.{name} is {getattr(vision, name)!r}; Idefics takes one number"
            )


def _contracts(config: Any, text: Any, perceiver: PerceiverConfig) -> dict[str, StageContract]:
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    image_embeds = float_spec("image_embeds", "batch", tokens, perceiver.width)
    cross = cross_cache(config)
    shape = ("batch", cross.num_heads, IMAGE_SEQUENCE, cross.head_size)
    key_values = tuple(float_spec(name, *shape) for name in cross.names())
    images = Axis(name="images", min=1, opt=1, max=MAX_IMAGES)
    latents = Axis(
        name=IMAGE_SEQUENCE, min=perceiver.num_latents, opt=perceiver.num_latents,
        max=MAX_IMAGES * perceiver.num_latents,
    )  # fmt: skip
    language = language_contracts(text)
    llm = language["llm"]
    seen = TensorSpec(name="image_attention_mask", dtype="int64", shape=("batch", "sequence", "images"))
    return {
        "encoder": StageContract(
            name="encoder",
            inputs=(float_spec("pixel_values", "batch", 3, vision.image_size, vision.image_size),),
            outputs=(image_embeds,),
            axes=(batch_axis(),),
        ),
        "connector": StageContract(
            name="connector",
            inputs=(image_embeds,),
            outputs=(float_spec("image_features", "batch", perceiver.num_latents, perceiver.width),),
            axes=(batch_axis(),),
        ),
        "embed_tokens": language["embed_tokens"],
        "cross_kv": StageContract(
            name="cross_kv",
            inputs=(float_spec("image_features", "batch", IMAGE_SEQUENCE, perceiver.width),),
            outputs=key_values,
            axes=(batch_axis(), latents),
        ),
        "llm": StageContract(
            name="llm",
            inputs=(*llm.inputs, seen, *key_values),
            outputs=llm.outputs,
            axes=(*llm.axes, images, latents),
        ),
    }


def _cross_kv_name(name: str) -> str:
    _, layer, rest = name.split(".", 2)
    return f"{CROSS_LAYERS}{layer}.cross_attn.{rest}"


def _decoder_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _fill_position_ids(module: nn.Module) -> None:
    """Positions are a buffer that is not stored, and the meta device computed none."""
    embeddings: Any = module.model.embeddings  # type: ignore[union-attr]  # an IdeficsEncoder
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]


def _make_rotary(module: nn.Module) -> None:
    """Frequencies were built on the meta device, which computes nothing; cross-attention never reads its own."""
    from transformers.models.idefics.modeling_idefics import IdeficsRotaryEmbedding

    make: Any = IdeficsRotaryEmbedding
    config = module.config
    layers: Any = (*module.layers, *module.gated_cross_attn_layers)  # type: ignore[misc]  # ModuleLists
    for layer in layers:
        attention = layer.self_attn if hasattr(layer, "self_attn") else layer.cross_attn
        attention.rotary_emb = make(config)


def _tied(config: Any) -> dict[str, str]:
    if not config.tie_word_embeddings:
        return {}
    tied = {"lm_head.weight": f"{EMBEDDING}weight"}
    if config.additional_vocab_size:
        tied["lm_head.additional_fc.weight"] = f"{EMBEDDING}additional_embedding.weight"
    return tied


def _ignored(config: Any) -> frozenset[str]:
    """The norm of a pooled output that nothing reads, and buffers that older transformers stored."""
    names = {f"{VISION_MODEL}post_layernorm.*", f"{VISION_MODEL}embeddings.position_ids"}
    for i in range(config.num_hidden_layers):
        names.add(f"model.layers.{i}.self_attn.rotary_emb.inv_freq")
    for i in range(config.num_hidden_layers // config.cross_layer_interval):
        names.add(f"{CROSS_LAYERS}{i}.cross_attn.rotary_emb.inv_freq")
    return frozenset(names)
