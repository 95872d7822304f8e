"""InstructBLIP checkpoints (Dai et al. 2023, arXiv 2305.06500): BLIP-2 whose Q-Former reads the instruction too.

InstructBLIP-Video is the same model over the frames of a video, each frame with the whole instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError
from .contract import Axis, StageContract, TensorSpec
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
from .stages import Layout, Stage
from .t5 import t5_contracts, t5_ignored, t5_kv_cache, t5_stages, t5_tied

# Where a checkpoint keeps decoder and head, and the text models that it may have.
_LANGUAGE_MODEL = {"model": "language_model.model.", "lm_head": "language_model.lm_head."}
_TEXT_MODELS = ("llama", "opt", "t5")
# In example inputs, rows of instructions are padded on the right by up to so many tokens.
_MOST_PADDING = 3


class InstructBlipEncoder(nn.Module):
    """transformers' `InstructBlipVisionModel` (or the same of the video model), with eager attention.

    Eager, because it exports to MatMul and Softmax alone.
    """

    def __init__(self, vision_config: Any, architecture: str) -> None:
        super().__init__()
        import transformers

        make: Any = getattr(transformers, architecture)
        self.model = make._from_config(vision_config, attn_implementation="eager")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` `[B, 3, H, W]` to `image_embeds` `[B, N, Dv]`, the final LayerNorm applied."""
        image_embeds: Tensor = self.model(pixel_values=pixel_values).last_hidden_state
        return image_embeds


class InstructBlipConnector(nn.Module):
    """Q-Former over picture and instruction, and the linear layer into the language model's embedding space."""

    def __init__(self, qformer_config: QFormerConfig, text_hidden_size: int) -> None:
        super().__init__()
        self.qformer = QFormer(qformer_config)
        self.language_projection = nn.Linear(qformer_config.hidden_size, text_hidden_size)
        # Only the queries go on, so nothing comes of the instruction behind the last attention.
        last: Any = self.qformer.layers[-1]
        last.text_feed_forward = None

    def forward(self, image_embeds: Tensor, qformer_input_ids: Tensor, qformer_attention_mask: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` and instructions `[B, L]` (mask 1: a token, 0: padding) to `[B, Q, D]`.

        Queries and instruction see each other in every self-attention; the queries alone see the picture.
        """
        output = self.qformer(image_embeds, qformer_input_ids, text_attention_mask=qformer_attention_mask)
        features: Tensor = self.language_projection(output.query_embeds)
        return features

    def with_attention(
        self, image_embeds: Tensor, qformer_input_ids: Tensor, qformer_attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, and where each query looked: `[B, layers with cross-attention, heads, Q, N]`."""
        output = self.qformer(
            image_embeds, qformer_input_ids, text_attention_mask=qformer_attention_mask, with_attention=True
        )
        return self.language_projection(output.query_embeds), torch.stack(output.cross_attention, dim=1)


def conditional_generation(config: Any) -> Layout:
    """`InstructBlipForConditionalGeneration` in the stages encoder, connector, embed_tokens and llm."""
    return _layout(config, "instructblip", "InstructBlipVisionModel", image_token="image_token_index")


def video_generation(config: Any) -> Layout:
    """`InstructBlipVideoForConditionalGeneration`: the same stages; `batch` counts the frames of all videos."""
    return _layout(config, "instructblip-video", "InstructBlipVideoVisionModel", image_token="video_token_index")


def _layout(config: Any, kind: str, vision_model: str, *, image_token: str) -> Layout:
    _check(config, image_token)
    text = config.text_config
    seq2seq = text.model_type == "t5"
    qformer = QFormerConfig.from_transformers(
        config.qformer_config.to_dict()
        | {"encoder_hidden_size": config.vision_config.hidden_size, "use_qformer_text_input": True},
        config.num_query_tokens,
    )
    connector = Stage(
        lambda: InstructBlipConnector(qformer, text.hidden_size),
        _connector_name(qformer),
        examples=partial(_examples, config),
    )
    return Layout(
        kind=kind,
        stages={
            "encoder": _encoder(config, vision_model),
            "connector": connector,
            **(t5_stages(text) if seq2seq else language_stages(text, **_LANGUAGE_MODEL)),
        },
        contracts={
            "encoder": _encoder_contract(config),
            "connector": _connector_contract(config),
            **(t5_contracts(text) if seq2seq else language_contracts(text)),
        },
        kv_cache=t5_kv_cache(text) if seq2seq else kv_cache(text),
        text_config=text,
        ignored=_ignored(config) | (t5_ignored() if seq2seq else frozenset()),
        tied=t5_tied() if seq2seq else tied_head(text, **_LANGUAGE_MODEL),
    )


def _check(config: Any, image_token: str) -> None:
    text, vision = config.text_config, config.vision_config
    if text.model_type not in _TEXT_MODELS:
        raise UnsupportedError(
            f"config.json: text_config is of model_type {text.model_type!r}; built so far are {', '.join(_TEXT_MODELS)}"
        )
    check_image_token(config, text, image_token)
    if getattr(text, "word_embed_proj_dim", text.hidden_size) != text.hidden_size:
        raise UnsupportedError(
            f"config.json: word_embed_proj_dim {text.word_embed_proj_dim} differs from hidden_size "
            f"{text.hidden_size}; picture embeddings could not stand beside word embeddings"
        )
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise CheckpointError(
                f"config.json: vision_config.{name} is {getattr(vision, name)!r}; InstructBLIP takes one number"
            )


def _encoder(config: Any, vision_model: str) -> Stage:
    vision = config.vision_config
    return Stage(
        lambda: InstructBlipEncoder(vision, vision_model), lambda name: f"vision_model.{name.removeprefix('model.')}"
    )


def _connector_name(qformer: QFormerConfig) -> Callable[[str], str]:
    """BLIP-2's names, but the embeddings and their LayerNorm are inside the Q-Former."""
    names: dict[str, str] = {}
    for ours, theirs in transformers_names(qformer).items():
        theirs = theirs.replace("qformer.layernorm.", "qformer.embeddings.layernorm.")
        names[f"qformer.{ours}"] = f"qformer.{theirs}" if theirs.startswith("embeddings.") else theirs
    return lambda name: names.get(name, name)


def _ignored(config: Any) -> frozenset[str]:
    """Buffers that older transformers stored, and the text's part of the last layer, of which nothing comes."""
    last = f"qformer.encoder.layer.{config.qformer_config.num_hidden_layers - 1}"
    unused = {
        f"{last}.{module}.{part}"
        for module in ("intermediate.dense", "output.dense", "output.LayerNorm")
        for part in ("weight", "bias")
    }
    buffers = {f"{module}.embeddings.position_ids" for module in ("qformer", "vision_model")}
    rotary = {f"layers.{i}.self_attn.rotary_emb" for i in range(config.text_config.num_hidden_layers)} | {"rotary_emb"}
    return frozenset(unused | buffers | {f"{_LANGUAGE_MODEL['model']}{module}.inv_freq" for module in rotary})


def _encoder_contract(config: Any) -> StageContract:
    vision = config.vision_config
    return StageContract(
        name="encoder",
        inputs=(float_spec("pixel_values", "batch", 3, vision.image_size, vision.image_size),),
        outputs=(_image_embeds(config),),
        axes=(batch_axis(),),
    )


def _connector_contract(config: Any) -> StageContract:
    longest = config.qformer_config.max_position_embeddings
    return StageContract(
        name="connector",
        inputs=(
            _image_embeds(config),
            TensorSpec(name="qformer_input_ids", dtype="int64", shape=("batch", "text")),
            TensorSpec(name="qformer_attention_mask", dtype="int64", shape=("batch", "text")),
        ),
        outputs=(float_spec("image_features", "batch", config.num_query_tokens, config.text_config.hidden_size),),
        axes=(batch_axis(), Axis(name="text", min=1, opt=min(32, longest), max=longest)),
    )


def _image_embeds(config: Any) -> TensorSpec:
    """Patches and the class token."""
    vision = config.vision_config
    return float_spec("image_embeds", "batch", (vision.image_size // vision.patch_size) ** 2 + 1, vision.hidden_size)


def _examples(config: Any, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Random pictures, each with an instruction; rows are right-padded by different lengths."""
    batch, length = sizes["batch"], sizes["text"]
    _, tokens, width = _image_embeds(config).shape
    padding = torch.arange(batch) % (min(_MOST_PADDING, length - 1) + 1)
    return {
        "image_embeds": torch.randn(batch, int(tokens), int(width), generator=generator),
        "qformer_input_ids": torch.randint(0, config.qformer_config.vocab_size, (batch, length), generator=generator),
        "qformer_attention_mask": (torch.arange(length)[None] < (length - padding)[:, None]).long(),
    }
