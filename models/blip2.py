"""BLIP-2 checkpoints (Li et al. 2023, arXiv 2301.12597): encoder, Q-Former, projection, language model.

The vision encoder and the language model are transformers' modules; the connector is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError
from .contract import Axis, KvCacheContract, StageContract, TensorSpec
from .qformer import QFormer, QFormerConfig, transformers_names
from .stages import Layout, Stage

MAX_BATCH = 64


class Blip2Encoder(nn.Module):
    """transformers' `Blip2VisionModel`, tensors in and tensors out, with eager attention.

    Eager, because it exports to MatMul and Softmax alone.
    """

    def __init__(self, vision_config: Any) -> None:
        super().__init__()
        from transformers import Blip2VisionModel

        make: Any = Blip2VisionModel  # `_from_config` is not typed
        self.model = make._from_config(vision_config, attn_implementation="eager")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` `[B, 3, H, W]` to `image_embeds` `[B, N, Dv]`, the final LayerNorm applied."""
        image_embeds: Tensor = self.model(pixel_values=pixel_values).last_hidden_state
        return image_embeds


class Blip2Connector(nn.Module):
    """Q-Former and the linear layer into the language model's embedding space."""

    def __init__(self, qformer_config: QFormerConfig, text_hidden_size: int) -> None:
        super().__init__()
        self.qformer = QFormer(qformer_config)
        self.language_projection = nn.Linear(qformer_config.hidden_size, text_hidden_size)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` to `image_features` `[B, Q, D]`."""
        features: Tensor = self.language_projection(self.qformer(image_embeds).query_embeds)
        return features

    def with_attention(self, image_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and where each query looked: `[B, layers with cross-attention, heads, Q, N]`."""
        output = self.qformer(image_embeds, with_attention=True)
        return self.language_projection(output.query_embeds), torch.stack(output.cross_attention, dim=1)


class Blip2RetrievalConnector(nn.Module):
    """Q-Former with its text branch, the two projections of image-text contrast and the matching head."""

    def __init__(self, qformer_config: QFormerConfig, projection_size: int) -> None:
        super().__init__()
        self.qformer = QFormer(qformer_config)
        self.vision_projection = nn.Linear(qformer_config.hidden_size, projection_size)
        self.text_projection = nn.Linear(qformer_config.hidden_size, projection_size)
        self.itm_head = nn.Linear(qformer_config.hidden_size, 2)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` to `image_features` `[B, Q, P]`, each of length 1."""
        return F.normalize(self.vision_projection(self.qformer(image_embeds).query_embeds), dim=-1)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`input_ids` `[T, L]`, without placeholders, to `[T, P]` of length 1, from the first token."""
        text = self.qformer(input_ids=input_ids, text_attention_mask=attention_mask).text_embeds
        return F.normalize(self.text_projection(text[:, 0]), dim=-1)

    def contrast(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Image-text contrast: the best query's cosine, `[B, T]` for `B` pictures and `T` texts."""
        similarity = self.forward(image_embeds) @ self.text_features(input_ids, attention_mask).t()
        return similarity.amax(dim=1)

    def match(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Image-text matching: logits `[B, 2]` (no, yes) of each picture with its own text."""
        output = self.qformer(image_embeds, input_ids, text_attention_mask=attention_mask)
        logits: Tensor = self.itm_head(output.query_embeds).mean(dim=1)
        return logits


def conditional_generation(config: Any) -> Layout:
    """`Blip2ForConditionalGeneration` in the stages encoder, connector, embed_tokens and llm."""
    _check_generation(config)
    text = config.text_config
    qformer = _qformer_config(config, text=False)
    names = {f"qformer.{ours}": theirs for ours, theirs in transformers_names(qformer).items()}
    tied = {"language_model.lm_head.weight": _EMBEDDINGS[text.model_type]} if text.tie_word_embeddings else {}
    return Layout(
        kind="blip-2",
        stages={
            "encoder": _encoder(config),
            "connector": Stage(lambda: Blip2Connector(qformer, text.hidden_size), _named(names)),
            "embed_tokens": Stage(
                lambda: nn.Embedding(text.vocab_size, text.hidden_size),
                lambda name: _EMBEDDINGS[text.model_type],
            ),
            "llm": Stage(
                lambda: _language_model(text),
                lambda name: f"language_model.{name}",
                finish=_finish_language_model,
            ),
        },
        contracts={
            "encoder": _encoder_contract(config),
            "connector": _connector_contract(config, text.hidden_size),
            "embed_tokens": _embed_tokens_contract(text),
            "llm": _llm_contract(text),
        },
        kv_cache=_kv_cache(text),
        ignored=_ignored(config),
        tied=tied,
    )


def image_text_retrieval(config: Any) -> Layout:
    """`Blip2ForImageTextRetrieval` in the stages encoder and connector; it has no language model."""
    if not config.qformer_config.use_qformer_text_input:
        raise CheckpointError(
            "config.json: qformer_config.use_qformer_text_input is false, so the Q-Former of this "
            "Blip2ForImageTextRetrieval could not read text; set it to true"
        )
    qformer = _qformer_config(config, text=True)
    size = config.image_text_hidden_size
    names = {f"qformer.{ours}": theirs for ours, theirs in transformers_names(qformer).items()}
    return Layout(
        kind="blip-2-retrieval",
        stages={
            "encoder": _encoder(config),
            "connector": Stage(lambda: Blip2RetrievalConnector(qformer, size), _named(names)),
        },
        contracts={
            "encoder": _encoder_contract(config),
            "connector": _connector_contract(config, size),
        },
        ignored=frozenset({"embeddings.position_ids", "vision_model.embeddings.position_ids"}),
    )


# Where each text model keeps its embedding.
_EMBEDDINGS = {
    "llama": "language_model.model.embed_tokens.weight",
    "opt": "language_model.model.decoder.embed_tokens.weight",
}


def _check_generation(config: Any) -> None:
    text = config.text_config
    if text.model_type not in _EMBEDDINGS:
        raise UnsupportedError(
            f"config.json: text_config is of model_type {text.model_type!r}; built so far are {', '.join(_EMBEDDINGS)}"
        )
    if config.image_token_index is None:
        raise CheckpointError(
            "config.json has no image_token_index, so nothing says which token stands for the picture; "
            "save the checkpoint again with transformers 4.46 or newer"
        )
    if not 0 <= config.image_token_index < text.vocab_size:
        raise CheckpointError(
            f"config.json: image_token_index {config.image_token_index} is outside the text model's "
            f"vocabulary of {text.vocab_size}; give the id of the image token"
        )
    if getattr(text, "word_embed_proj_dim", text.hidden_size) != text.hidden_size:
        raise UnsupportedError(
            f"config.json: word_embed_proj_dim {text.word_embed_proj_dim} differs from hidden_size "
            f"{text.hidden_size}; picture embeddings could not stand beside word embeddings"
        )


def _encoder(config: Any) -> Stage:
    vision = config.vision_config
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise CheckpointError(
                f"config.json: vision_config.{name} is {getattr(vision, name)!r}; BLIP-2 takes one number"
            )
    return Stage(lambda: Blip2Encoder(vision), lambda name: f"vision_model.{name.removeprefix('model.')}")


def _qformer_config(config: Any, *, text: bool) -> QFormerConfig:
    values: Mapping[str, Any] = config.qformer_config.to_dict() | {
        "encoder_hidden_size": config.vision_config.hidden_size,
        "use_qformer_text_input": text,
    }
    return QFormerConfig.from_transformers(values, config.num_query_tokens)


def _named(names: Mapping[str, str]) -> Callable[[str], str]:
    """The heads around the Q-Former have the same names here and in transformers."""
    return lambda name: names.get(name, name)


def _language_model(text_config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM  # `from_config` is not typed
    model: nn.Module = make.from_config(text_config, attn_implementation="sdpa")
    return model


def _finish_language_model(module: nn.Module) -> None:
    """Make what is computed and not stored, and make tied weights one parameter again."""
    from transformers import PreTrainedModel
    from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding

    if isinstance(module, LlamaForCausalLM):
        # Its frequencies were built on the meta device, which computes nothing.
        module.model.rotary_emb = LlamaRotaryEmbedding(config=module.config)
    if isinstance(module, PreTrainedModel):
        module.tie_weights()


def _ignored(config: Any) -> frozenset[str]:
    """Buffers that older transformers stored, and the Q-Former's text branch, which generation never runs."""
    names = {"vision_model.embeddings.position_ids", "language_model.model.rotary_emb.inv_freq"}
    for i in range(config.text_config.num_hidden_layers):
        names.add(f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq")
    if config.qformer_config.use_qformer_text_input:
        for i in range(config.qformer_config.num_hidden_layers):
            for module in ("intermediate.dense", "output.dense", "output.LayerNorm"):
                names |= {f"qformer.encoder.layer.{i}.{module}.{part}" for part in ("weight", "bias")}
    return frozenset(names)


def _batch() -> Axis:
    return Axis(name="batch", min=1, opt=1, max=MAX_BATCH)


def _encoder_contract(config: Any) -> StageContract:
    vision = config.vision_config
    return StageContract(
        name="encoder",
        inputs=(_float("pixel_values", "batch", 3, vision.image_size, vision.image_size),),
        outputs=(_float("image_embeds", "batch", _num_image_tokens(vision), vision.hidden_size),),
        axes=(_batch(),),
    )


def _connector_contract(config: Any, width: int) -> StageContract:
    vision = config.vision_config
    return StageContract(
        name="connector",
        inputs=(_float("image_embeds", "batch", _num_image_tokens(vision), vision.hidden_size),),
        outputs=(_float("image_features", "batch", config.num_query_tokens, width),),
        axes=(_batch(),),
    )


def _embed_tokens_contract(text: Any) -> StageContract:
    return StageContract(
        name="embed_tokens",
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),),
        outputs=(_float("inputs_embeds", "batch", "sequence", text.hidden_size),),
        axes=(_batch(), _length("sequence", text)),
    )


def _llm_contract(text: Any) -> StageContract:
    return StageContract(
        name="llm",
        inputs=(
            _float("inputs_embeds", "batch", "sequence", text.hidden_size),
            TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "total_sequence")),
            TensorSpec(name="logits_position", dtype="int64", shape=("batch",)),
        ),
        outputs=(_float("logits", "batch", text.vocab_size),),
        axes=(_batch(), _length("sequence", text), _length("total_sequence", text)),
    )


def _kv_cache(text: Any) -> KvCacheContract:
    heads = text.num_attention_heads
    return KvCacheContract(
        num_layers=text.num_hidden_layers,
        num_heads=getattr(text, "num_key_value_heads", heads),
        head_size=getattr(text, "head_dim", text.hidden_size // heads),
        dtype="float32",
        shared_buffer=True,
    )


def _num_image_tokens(vision: Any) -> int:
    """Patches and the class token."""
    patches: int = (vision.image_size // vision.patch_size) ** 2
    return patches + 1


def _length(name: str, text: Any) -> Axis:
    context = text.max_position_embeddings
    return Axis(name=name, min=1, opt=min(64, context), max=context)


def _float(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)
