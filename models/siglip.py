"""SigLIP checkpoints (Zhai et al. 2023, arXiv 2303.15343): as CLIP, but every pair of picture and text is judged alone.

SigLIP 2 checkpoints of a fixed resolution are of the same classes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError
from .attention import CrossAttention
from .dual_encoder import TextTower, check_config, contracts, prefixed, restore_position_ids, text_examples
from .stages import Layout, Stage


class SiglipEncoder(nn.Module):
    """transformers' `SiglipVisionModel` without its pooling head."""

    def __init__(self, vision_config: Any) -> None:
        super().__init__()
        from transformers import SiglipVisionModel

        make: Any = SiglipVisionModel  # `_from_config` is not typed
        self.model = make._from_config(vision_config, attn_implementation="eager")
        del self.model.head

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` `[B, 3, H, W]` to `image_embeds` `[B, N, Dv]`, the final LayerNorm applied."""
        hidden = self.model.encoder(inputs_embeds=self.model.embeddings(pixel_values)).last_hidden_state
        image_embeds: Tensor = self.model.post_layernorm(hidden)
        return image_embeds


class PackedAttention(nn.Module):
    """The weights of a `torch.nn.MultiheadAttention` as they are stored; `unpack` makes a module of them."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def unpack(self) -> CrossAttention:
        """Query, key and value apart, over the same memory."""
        width = self.out_proj.in_features
        with torch.device("meta"):
            attention = CrossAttention(width, width, self.num_heads)
        parts = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        state = {
            f"{name}.{part}": tensor
            for name, pair in zip(("query", "key", "value"), parts, strict=True)
            for part, tensor in zip(("weight", "bias"), pair, strict=True)
        }
        state |= {f"output.{name}": tensor for name, tensor in self.out_proj.state_dict().items()}
        attention.load_state_dict(state, assign=True)
        return attention


class SiglipConnector(nn.Module):
    """Attention pooling: one learned query (`probe`) reads the patches, then a residual feed-forward.

    Zhai et al. 2022, "Scaling Vision Transformers" (arXiv 2106.04560), section 3.2. `logit_scale` and `logit_bias` are
    kept for whoever scores.
    """

    def __init__(self, vision_config: Any) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        width = vision_config.hidden_size
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.attention: PackedAttention | CrossAttention = PackedAttention(width, vision_config.num_attention_heads)
        self.layernorm = nn.LayerNorm(width, eps=vision_config.layer_norm_eps)
        self.activation = ACT2FN[vision_config.hidden_act]
        self.fc1 = nn.Linear(width, vision_config.intermediate_size)
        self.fc2 = nn.Linear(vision_config.intermediate_size, width)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1))

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` to `image_features` `[B, Dv]` of length 1."""
        pooled, _ = self.attention(self.probe.expand(image_embeds.shape[0], -1, -1), image_embeds)
        pooled = pooled + self.fc2(self.activation(self.fc1(self.layernorm(pooled))))
        return F.normalize(pooled[:, 0], dim=-1)


class SiglipTextEncoder(TextTower):
    """Every token sees every token; the last position stands for the text, be it padding."""

    def __init__(self, text_config: Any) -> None:
        from transformers import SiglipTextModel

        head = nn.Linear(text_config.hidden_size, text_config.projection_size)
        super().__init__(SiglipTextModel, text_config, head)
        del self.model.head  # is `projection` here

    def keep(self, attention_mask: Tensor) -> Tensor:
        """`[B, L]`: what the caller does not mask."""
        return attention_mask

    def pool(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """`[B, L, D]` to `[B, D]`."""
        return hidden[:, -1]


def image_text_model(config: Any) -> Layout:
    """`SiglipModel` in the stages encoder, connector and text_encoder."""
    check_config(config, vision="siglip_vision_model", text="siglip_text_model")
    text, vision = config.text_config, config.vision_config
    if not vision.vision_use_head:
        raise UnsupportedError("config.json: vision_config.vision_use_head is false; scores need the head")
    if text.projection_size != vision.hidden_size:
        raise CheckpointError(
            f"config.json: text_config.projection_size is {text.projection_size} and vision_config.hidden_size "
            f"{vision.hidden_size}; texts and pictures are compared, so the two must be one number"
        )
    tower = {"model.": "text_model.", "projection.": "text_model.head."}
    return Layout(
        kind="siglip",
        stages={
            "encoder": Stage(
                lambda: SiglipEncoder(vision), prefixed({"model.": "vision_model."}), finish=restore_position_ids
            ),
            "connector": Stage(lambda: SiglipConnector(vision), _connector_name, finish=_unpack_attention),
            "text_encoder": Stage(
                lambda: SiglipTextEncoder(text),
                prefixed(tower),
                finish=restore_position_ids,
                examples=partial(text_examples, vocab_size=text.vocab_size),
            ),
        },
        contracts=contracts(config, extra_tokens=0, width=vision.hidden_size),
        ignored=frozenset(f"{tower}.embeddings.position_ids" for tower in ("vision_model", "text_model")),
    )


def _connector_name(name: str) -> str:
    if name in ("logit_scale", "logit_bias"):
        return name
    return f"vision_model.head.{'mlp.' if name.startswith('fc') else ''}{name}"


def _unpack_attention(module: nn.Module) -> None:
    assert isinstance(module, SiglipConnector)
    assert isinstance(module.attention, PackedAttention)
    module.attention = module.attention.unpack()
