"""Qwen2-VL and Qwen2.5-VL checkpoints (Wang et al. 2024, arXiv 2409.12191; Bai et al. 2025, arXiv 2502.13923).

A picture keeps its own size: the vision tower reads all of its patches in one sequence, the patch merger makes one
token of a square of them, and the language model gives every token three positions (time, height, width: M-RoPE).
Nothing in the graphs depends on the picture's grid: where a patch lies comes in as tensors. The axis `tokens` counts
merged tokens; the `M = merge_size^2` patches of each stand in the second axis.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLTextConfig, Qwen2VLTextConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2

from ..errors import CheckpointError, UnsupportedError
from .contract import Axis, StageContract, TensorSpec
from .language import (
    check_image_token,
    embed_tokens_contract,
    float_spec,
    kv_cache,
    language_stages,
    llm_contract,
    tied_head,
)
from .patch_merger import PatchMerger
from .stages import Layout, Stage

# Names of the releases before transformers 4.52, which `save_pretrained` still writes.
RENAMES = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
)
LANGUAGE_MODEL = {"model": "model.language_model.", "lm_head": "lm_head."}
_VISUAL = "model.visual."
MAX_TOKENS = 16384  # the largest picture that Qwen's own processors make
MROPE_AXES = 3
_MROPE_SECTION = (16, 24, 24)  # transformers' default: frequencies of time, height and width
# Exactly zero after a softmax in FP32, and within FP16.
_MASKED = -1e4


class PatchEncoder(nn.Module):
    """transformers' vision tower of Qwen2-VL, without its merger, for one picture.

    Attention is over all patches. Weights, norms and feed-forward layers are transformers' modules; what its forward
    reads off the grid (positions, sequence lengths) comes in. `finish_encoder` completes the module.
    """

    def __init__(self, vision_config: Any) -> None:
        super().__init__()
        self.model = self._tower(vision_config)
        del self.model.merger

    def forward(self, pixel_values: Tensor, rotary_position_ids: Tensor) -> Tensor:
        """`[T, M, 3*2*P*P]` and int64 `[T, M, 2]` (row and column of each patch) to `image_embeds` `[T, M, Dv]`."""
        return self._encode(pixel_values, rotary_position_ids, [None] * len(self.model.blocks))

    def _tower(self, vision_config: Any) -> Any:
        make: Any = qwen2.Qwen2VisionTransformerPretrainedModel  # `_from_config` is not typed
        return make._from_config(vision_config, attn_implementation="eager")

    def _encode(self, pixel_values: Tensor, rotary_position_ids: Tensor, masks: list[Tensor | None]) -> Tensor:
        """`masks`: for each block None, or what is added to its scores, `[N, N]` over the `N = T * M` patches."""
        x = self.model.patch_embed.proj(pixel_values.flatten(0, 1))
        rotary = self.model.rotary_pos_emb(x, rotary_position_ids.flatten(0, 1))
        for block, mask in zip(self.model.blocks, masks, strict=True):
            x = x + _attend(block.attn, block.norm1(x), rotary, mask)
            x = x + block.mlp(block.norm2(x))
        image_embeds: Tensor = x.reshape(*pixel_values.shape[:2], -1)
        return image_embeds


def _attend(attention: Any, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    """`x` `[N, Dv]` through transformers' `VisionAttention`, every patch seeing what `mask` `[N, N]` lets it."""
    states = (part.reshape(-1, attention.num_heads, attention.head_dim) for part in attention.qkv(x).chunk(3, dim=-1))
    query, key, value = states
    query, key = qwen2.apply_rotary_pos_emb_vision(query, key, *rotary)
    scores = query.transpose(0, 1) @ key.permute(1, 2, 0) * attention.scaling
    if mask is not None:
        scores = scores + mask
    attended = scores.softmax(dim=-1) @ value.transpose(0, 1)
    projected: Tensor = attention.proj(attended.transpose(0, 1).flatten(1))
    return projected


def finish_encoder(module: nn.Module) -> None:
    """Frequencies, which are computed and not stored, and the patches' convolution as the dot product that it is.

    Its kernel is as large as its stride and as its input.
    """
    model: Any = module.model
    model.rotary_pos_emb = type(model.rotary_pos_emb)(model.config)
    weight = model.patch_embed.proj.weight.flatten(1)
    with torch.device("meta"):
        model.patch_embed.proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.patch_embed.proj.weight = nn.Parameter(weight, requires_grad=False)


class WindowPatchEncoder(PatchEncoder):
    """transformers' vision tower of Qwen2.5-VL, without its merger, for one picture.

    Most blocks attend within windows. transformers sorts the patches by window; here they stay in the picture's order
    and a mask says which share a window: attention does not depend on the order.
    """

    def __init__(self, vision_config: Any) -> None:
        super().__init__(vision_config)
        self.full_blocks = frozenset(vision_config.fullatt_block_indexes)

    def forward(self, pixel_values: Tensor, rotary_position_ids: Tensor, token_windows: Tensor) -> Tensor:  # type: ignore[override]  # windows come in too
        """As `PatchEncoder.forward`; `token_windows` int64 `[T]`: the window of each token, which its patches share."""
        windows = token_windows[:, None].expand(-1, pixel_values.shape[1]).flatten()
        mask = torch.where(windows[:, None] == windows[None, :], 0.0, _MASKED)
        blocks = range(len(self.model.blocks))
        masks = [None if block in self.full_blocks else mask for block in blocks]
        return self._encode(pixel_values, rotary_position_ids, masks)

    def _tower(self, vision_config: Any) -> Any:
        make: Any = qwen2_5.Qwen2_5_VisionTransformerPretrainedModel
        return make._from_config(vision_config, attn_implementation="eager")


class MergerConnector(nn.Module):
    """The patch merger as a stage of its own."""

    def __init__(self, merger: PatchMerger) -> None:
        super().__init__()
        self.merger = merger

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[T, M, Dv]` to `image_features` `[1, T, D]`."""
        features: Tensor = self.merger(image_embeds)
        return features[None]


class _CausalLM:
    """A text model and its LM head: transformers has them only together with the vision tower."""

    model: Any
    lm_head: nn.Linear

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.embed_tokens
        return embeddings

    def forward(self, **inputs: Any) -> CausalLMOutputWithPast:
        """`inputs_embeds` `[B, S, D]`, `position_ids` `[3, B, S]` and what else the text model takes."""
        output = self.model(**inputs)
        logits: Any = self.lm_head(output.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


class Qwen2VLTextForCausalLM(_CausalLM, qwen2.Qwen2VLPreTrainedModel):  # type: ignore[no-untyped-call]
    """Qwen2-VL's language model alone."""

    config_class = Qwen2VLTextConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = qwen2.Qwen2VLTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


class Qwen25VLTextForCausalLM(_CausalLM, qwen2_5.Qwen2_5_VLPreTrainedModel):  # type: ignore[no-untyped-call]
    """Qwen2.5-VL's language model alone."""

    config_class = Qwen2_5_VLTextConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = qwen2_5.Qwen2_5_VLTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Generation:
    """What tells the two apart. `width`, `output_width`: their names in the vision config."""

    kind: str
    encoder: type[PatchEncoder]
    norm: Literal["layer", "rms"]
    width: str
    output_width: str
    language_model: type[_CausalLM]


_QWEN2 = _Generation("qwen2-vl", PatchEncoder, "layer", "embed_dim", "hidden_size", Qwen2VLTextForCausalLM)
_QWEN2_5 = _Generation(
    "qwen2.5-vl", WindowPatchEncoder, "rms", "hidden_size", "out_hidden_size", Qwen25VLTextForCausalLM
)


def qwen2_vl(config: Any) -> Layout:
    """`Qwen2VLForConditionalGeneration` in the stages encoder, connector, embed_tokens and llm."""
    return _layout(config, _QWEN2)


def qwen2_5_vl(config: Any) -> Layout:
    """`Qwen2_5_VLForConditionalGeneration` in the stages encoder, connector, embed_tokens and llm."""
    return _layout(config, _QWEN2_5)


def _layout(config: Any, generation: _Generation) -> Layout:
    text, vision = _text_config(config), config.vision_config
    check_image_token(config, text)
    _check_vision(vision, generation, text)
    stages = language_stages(text, **LANGUAGE_MODEL)
    make: Any = generation.language_model  # `_from_config` is not typed
    llm = replace(stages["llm"], build=lambda: make._from_config(text, attn_implementation="sdpa"))
    return Layout(
        kind=generation.kind,
        stages={
            "encoder": _encoder(generation, vision),
            "connector": _connector(generation, vision),
            "embed_tokens": stages["embed_tokens"],
            "llm": llm,
        },
        contracts={
            "encoder": _encoder_contract(generation, vision, text),
            "connector": _connector_contract(generation, vision, text),
            "embed_tokens": embed_tokens_contract(text),
            "llm": mrope_contract(llm_contract(text)),
        },
        kv_cache=kv_cache(text),
        text_config=text,
        ignored=frozenset({f"{_VISUAL}rotary_pos_emb.inv_freq", "model.language_model.rotary_emb.inv_freq"}),
        tied=tied_head(text, **LANGUAGE_MODEL),
        renames=RENAMES,
    )


def _text_config(config: Any) -> Any:
    """The text config with what its class leaves to the whole model or to a default of its module."""
    text = copy.deepcopy(config.text_config)
    text.tie_word_embeddings = config.tie_word_embeddings
    text.rope_parameters = {"mrope_section": list(_MROPE_SECTION)} | dict(text.rope_parameters)
    half = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
    sections = text.rope_parameters["mrope_section"]
    if len(sections) != len(_MROPE_SECTION) or sum(sections) != half:
        raise CheckpointError(
            f"config.json: mrope_section {sections} must be {len(_MROPE_SECTION)} numbers that make {half}, half of a "
            "head; correct it"
        )
    return text


def _check_vision(vision: Any, generation: _Generation, text: Any) -> None:
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise UnsupportedError(
                f"config.json: vision_config.{name} is {getattr(vision, name)!r}; built is one number, for square "
                "patches"
            )
    width = getattr(vision, generation.output_width)
    if width != text.hidden_size:
        raise CheckpointError(
            f"config.json: vision_config.{generation.output_width} is {width}, but the text model's hidden_size is "
            f"{text.hidden_size}; picture embeddings could not stand beside word embeddings"
        )


def _encoder(generation: _Generation, vision: Any) -> Stage:
    return Stage(
        lambda: generation.encoder(vision),
        lambda name: _VISUAL + name.removeprefix("model."),
        finish=finish_encoder,
        examples=lambda sizes, generator: _examples(vision, sizes["tokens"], generator),
    )


def _connector(generation: _Generation, vision: Any) -> Stage:
    width, output_width = getattr(vision, generation.width), getattr(vision, generation.output_width)
    return Stage(
        lambda: MergerConnector(
            PatchMerger(width, output_width, merge_size=vision.spatial_merge_size, norm=generation.norm)
        ),
        lambda name: _VISUAL + name,
    )


def _examples(vision: Any, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Inputs of the encoder, those of windows too: random places and windows."""
    patches = vision.spatial_merge_size**2
    return {
        "pixel_values": torch.randn(tokens, patches, _patch_values(vision), generator=generator),
        "rotary_position_ids": torch.randint(0, 8, (tokens, patches, 2), generator=generator),
        "token_windows": torch.randint(0, 3, (tokens,), generator=generator),
    }


def _encoder_contract(generation: _Generation, vision: Any, text: Any) -> StageContract:
    patches = vision.spatial_merge_size**2
    inputs = [
        float_spec("pixel_values", "tokens", patches, _patch_values(vision)),
        TensorSpec(name="rotary_position_ids", dtype="int64", shape=("tokens", patches, 2)),
    ]
    if generation.encoder is WindowPatchEncoder:
        inputs += [
            TensorSpec(name="token_windows", dtype="int64", shape=("tokens",)),
        ]
    return StageContract(
        name="encoder",
        inputs=tuple(inputs),
        outputs=(float_spec("image_embeds", "tokens", patches, getattr(vision, generation.width)),),
        axes=(_tokens(text),),
    )


def _connector_contract(generation: _Generation, vision: Any, text: Any) -> StageContract:
    patches = vision.spatial_merge_size**2
    return StageContract(
        name="connector",
        inputs=(float_spec("image_embeds", "tokens", patches, getattr(vision, generation.width)),),
        outputs=(float_spec("image_features", 1, "tokens", text.hidden_size),),
        axes=(_tokens(text),),
    )


def mrope_contract(llm: StageContract) -> StageContract:
    """The contract of a decoder whose positions, three for each token, come in."""
    positions = TensorSpec(name="position_ids", dtype="int64", shape=(MROPE_AXES, "batch", "sequence"))
    return llm.model_copy(update={"inputs": (*llm.inputs, positions)})


def _patch_values(vision: Any) -> int:
    values: int = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return values


def _tokens(text: Any) -> Axis:
    """Tokens of one picture: it must leave room for a prompt."""
    most = min(MAX_TOKENS, text.max_position_embeddings)
    return Axis(name="tokens", min=1, opt=min(256, most), max=most)
