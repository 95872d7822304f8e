"""BLIP-2 checkpoints (Li et al. 2023, arXiv 2301.12597): encoder, Q-Former, projection, language model.

The vision encoder and the language model are transformers' modules; the connector is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError
from .contract import StageContract
from .dual_encoder import text_axis, text_encoder_contract, text_examples, text_inputs
from .language import (
    batch_axis,
    check_image_token,
    float_spec,
    kv_cache,
    language_contracts,
    language_stages,
    tied_head,
)
from .qformer import QFormer, QFormerConfig, transformers_names
from .stages import ExampleInputs, Layout, Stage
from .t5 import t5_contracts, t5_ignored, t5_kv_cache, t5_stages, t5_tied


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


class Blip2TextEncoder(Blip2RetrievalConnector):
    """The same weights, reading a text."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`input_ids`, `attention_mask` `[B, L]` to `text_features` `[B, P]`, each of length 1."""
        return self.text_features(input_ids, attention_mask)


class Blip2Matcher(Blip2RetrievalConnector):
    """The same weights, reading a picture and a text together."""

    def __init__(self, qformer_config: QFormerConfig, projection_size: int) -> None:
        super().__init__(qformer_config, projection_size)
        # The head reads the queries alone, so nothing comes of the text behind the last attention.
        last: Any = self.qformer.layers[-1]
        last.text_feed_forward = None

    def forward(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Picture `[B, N, Dv]` and its text `[B, L]` to `logits` `[B, 2]` (no, yes)."""
        return self.match(image_embeds, input_ids, attention_mask)


def conditional_generation(config: Any) -> Layout:
    """`Blip2ForConditionalGeneration` in the stages encoder, connector, embed_tokens, llm and, with T5, llm_encoder."""
    _check_generation(config)
    text = config.text_config
    qformer = _qformer_config(config, text=False)
    names = {f"qformer.{ours}": theirs for ours, theirs in transformers_names(qformer).items()}
    return Layout(
        kind="blip-2",
        stages={
            "encoder": _encoder(config),
            "connector": Stage(lambda: Blip2Connector(qformer, text.hidden_size), _named(names)),
            **(t5_stages(text) if text.model_type == "t5" else language_stages(text, **_LANGUAGE_MODEL)),
        },
        contracts={
            "encoder": _encoder_contract(config),
            "connector": _connector_contract(config, text.hidden_size),
            **(t5_contracts(text) if text.model_type == "t5" else language_contracts(text)),
        },
        kv_cache=t5_kv_cache(text) if text.model_type == "t5" else kv_cache(text),
        text_config=text,
        ignored=_ignored(config) | t5_ignored(),
        tied=t5_tied() if text.model_type == "t5" else tied_head(text, **_LANGUAGE_MODEL),
    )


def image_text_retrieval(config: Any) -> Layout:
    """`Blip2ForImageTextRetrieval` in the stages encoder, connector, text_encoder and matcher; no language model.

    The last three are one Q-Former, so every stage after the encoder names the same tensors.
    """
    if not config.qformer_config.use_qformer_text_input:
        raise CheckpointError(
            "config.json: qformer_config.use_qformer_text_input is false, so the Q-Former of this "
            "Blip2ForImageTextRetrieval could not read text; set it to true"
        )
    qformer = _qformer_config(config, text=True)
    size, length = config.image_text_hidden_size, qformer.max_position_embeddings
    stored = _named({f"qformer.{ours}": theirs for ours, theirs in transformers_names(qformer).items()})
    texts = partial(text_examples, vocab_size=qformer.vocab_size)
    matcher = _matcher_contract(config, length)
    return Layout(
        kind="blip-2-retrieval",
        stages={
            "encoder": _encoder(config),
            "connector": Stage(lambda: Blip2RetrievalConnector(qformer, size), stored),
            "text_encoder": Stage(lambda: Blip2TextEncoder(qformer, size), stored, examples=texts),
            "matcher": Stage(lambda: Blip2Matcher(qformer, size), stored, examples=partial(_pairs, matcher, texts)),
        },
        contracts={
            "encoder": _encoder_contract(config),
            "connector": _connector_contract(config, size),
            "text_encoder": text_encoder_contract(length, size),
            "matcher": matcher,
        },
        ignored=frozenset({"embeddings.position_ids", "vision_model.embeddings.position_ids"}),
    )


# Where a checkpoint keeps decoder and head, and the text models that it may have.
_LANGUAGE_MODEL = {"model": "language_model.model.", "lm_head": "language_model.lm_head."}
_TEXT_MODELS = ("llama", "opt", "t5")


def _check_generation(config: Any) -> None:
    text = config.text_config
    if text.model_type not in _TEXT_MODELS:
        raise UnsupportedError(
            f"config.json: text_config is of model_type {text.model_type!r}; built so far are {', '.join(_TEXT_MODELS)}"
        )
    check_image_token(config, text, "image_token_index")
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


def _encoder_contract(config: Any) -> StageContract:
    vision = config.vision_config
    return StageContract(
        name="encoder",
        inputs=(float_spec("pixel_values", "batch", 3, vision.image_size, vision.image_size),),
        outputs=(float_spec("image_embeds", "batch", _num_image_tokens(vision), vision.hidden_size),),
        axes=(batch_axis(),),
    )


def _connector_contract(config: Any, width: int) -> StageContract:
    vision = config.vision_config
    return StageContract(
        name="connector",
        inputs=(float_spec("image_embeds", "batch", _num_image_tokens(vision), vision.hidden_size),),
        outputs=(float_spec("image_features", "batch", config.num_query_tokens, width),),
        axes=(batch_axis(),),
    )


def _matcher_contract(config: Any, length: int) -> StageContract:
    return StageContract(
        name="matcher",
        inputs=(_encoder_contract(config).outputs[0], *text_inputs()),
        outputs=(float_spec("logits", "batch", 2),),
        axes=(batch_axis(), text_axis(length)),
    )


def _pairs(
    contract: StageContract, texts: ExampleInputs, sizes: Mapping[str, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Random pictures, each with a text."""
    _, tokens, width = contract.input("image_embeds").shape
    image_embeds = torch.randn(sizes["batch"], int(tokens), int(width), generator=generator)
    return {"image_embeds": image_embeds, **texts(sizes, generator)}


def _num_image_tokens(vision: Any) -> int:
    """Patches and the class token."""
    patches: int = (vision.image_size // vision.patch_size) ** 2
    return patches + 1
