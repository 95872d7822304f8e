"""CLIP checkpoints (Radford et al. 2021, arXiv 2103.00020): picture and text side by side, and how alike they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .dual_encoder import TextTower, check_config, contracts, prefixed, restore_position_ids, text_examples
from .stages import Layout, Stage

# Configs written before transformers 4.32 name this end token whatever the tokenizer's is; transformers' model then
# takes the highest id of a row for the end, and so is it here.
_LEGACY_EOS = 2


class ClipEncoder(nn.Module):
    """transformers' `CLIPVisionModel` without its last LayerNorm, which only the class token gets."""

    def __init__(self, vision_config: Any) -> None:
        super().__init__()
        from transformers import CLIPVisionModel

        make: Any = CLIPVisionModel  # `_from_config` is not typed
        self.model = make._from_config(vision_config, attn_implementation="eager")
        del self.model.post_layernorm

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` `[B, 3, H, W]` to `image_embeds` `[B, N, Dv]`, the class token first."""
        hidden = self.model.pre_layrnorm(self.model.embeddings(pixel_values))
        image_embeds: Tensor = self.model.encoder(inputs_embeds=hidden).last_hidden_state
        return image_embeds


class ClipConnector(nn.Module):
    """LayerNorm and projection of the class token; `logit_scale` is kept for whoever scores."""

    def __init__(self, vision_config: Any, width: int) -> None:
        super().__init__()
        self.post_layernorm = nn.LayerNorm(vision_config.hidden_size, eps=vision_config.layer_norm_eps)
        self.visual_projection = nn.Linear(vision_config.hidden_size, width, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` to `image_features` `[B, P]` of length 1."""
        return F.normalize(self.visual_projection(self.post_layernorm(image_embeds[:, 0])), dim=-1)


class ClipTextEncoder(TextTower):
    """Every token sees itself and those before it; the first end token stands for the text."""

    def __init__(self, text_config: Any, width: int) -> None:
        from transformers import CLIPTextModel

        super().__init__(CLIPTextModel, text_config, nn.Linear(text_config.hidden_size, width, bias=False))
        self.eos_token_id = text_config.eos_token_id

    def keep(self, attention_mask: Tensor) -> Tensor:
        """`[B, L, L]`: what is no padding and not later."""
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        return attention_mask.bool()[:, None] & (positions[None] <= positions[:, None])

    def pool(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """`[B, L, D]` to `[B, D]` at the first end token, or at position 0 where there is none."""
        # int32: ArgMax of int64 is beyond some engines.
        ids = input_ids.to(torch.int32)
        marks = ids if self.eos_token_id == _LEGACY_EOS else (ids == self.eos_token_id).to(torch.int32)
        index = marks.argmax(dim=-1)[:, None, None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index)[:, 0]


def image_text_model(config: Any) -> Layout:
    """`CLIPModel` in the stages encoder, connector and text_encoder."""
    check_config(config, vision="clip_vision_model", text="clip_text_model")
    text, vision, width = config.text_config, config.vision_config, config.projection_dim
    if not isinstance(text.eos_token_id, int):
        raise CheckpointError(f"config.json: text_config.eos_token_id is {text.eos_token_id!r}; give one number")
    connector = {"post_layernorm.": "vision_model.post_layernorm.", "": ""}
    tower = {"model.": "text_model.", "projection.": "text_projection."}
    return Layout(
        kind="clip",
        stages={
            "encoder": Stage(
                lambda: ClipEncoder(vision), prefixed({"model.": "vision_model."}), finish=restore_position_ids
            ),
            "connector": Stage(lambda: ClipConnector(vision, width), prefixed(connector)),
            "text_encoder": Stage(
                lambda: ClipTextEncoder(text, width),
                prefixed(tower),
                finish=restore_position_ids,
                examples=partial(_examples, eos_token_id=text.eos_token_id, vocab_size=text.vocab_size),
            ),
        },
        contracts=contracts(config, extra_tokens=1, width=width),
        ignored=frozenset(f"{tower}.embeddings.position_ids" for tower in ("vision_model", "text_model")),
    )


def _examples(
    sizes: Mapping[str, int], generator: torch.Generator, *, eos_token_id: int, vocab_size: int
) -> dict[str, Tensor]:
    """Words, then the end token for the rest of the row, as CLIP's tokenizer pads."""
    inputs = text_examples(sizes, generator, vocab_size=vocab_size)
    ends = inputs["attention_mask"].sum(1, keepdim=True) - 1
    eos = vocab_size - 1 if eos_token_id == _LEGACY_EOS else eos_token_id
    behind = torch.arange(sizes["sequence"])[None] >= ends
    return inputs | {"input_ids": inputs["input_ids"].masked_fill(behind, eos)}
