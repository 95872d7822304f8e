"""Idefics3 and SmolVLM checkpoints (Laurençon et al. 2024, arXiv 2408.12637; Marafioti et al. 2025, arXiv 2504.05299).

A picture is cut into square tiles that fill the encoder's input, so no tile is padded and every patch has its own place
in the position embedding. Pixel shuffle and one linear layer make the language model's tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .contract import StageContract
from .idefics2 import CONNECTOR, LANGUAGE_MODEL, grid_side, place_table, tied_head, tied_text_config, vision_name
from .language import batch_axis, check_image_token, float_spec, kv_cache, language_contracts, language_stages
from .pixel_shuffle import PixelShuffle, PixelShuffleLinear
from .stages import Layout, Stage

_PROJECTION = {"projection.weight": f"{CONNECTOR}modality_projection.proj.weight"}


class TileEncoder(nn.Module):
    """transformers' `Idefics3VisionTransformer` (SmolVLM's is the same) for whole tiles, with eager attention."""

    def __init__(self, vision_config: Any) -> None:
        super().__init__()
        from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

        make: Any = Idefics3VisionTransformer  # `_from_config` is not typed
        self.model = make._from_config(vision_config, attn_implementation="eager")
        self.side = grid_side(vision_config)
        self.register_buffer("places", tile_places(self.side), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` `[B, 3, S, S]` to `image_embeds` `[B, N, Dv]`, the final LayerNorm applied."""
        embeddings = self.model.embeddings
        x = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        x = x + embeddings.position_embedding(self.get_buffer("places"))
        for layer in self.model.encoder.layers:
            x = layer(x, None)
        image_embeds: Tensor = self.model.post_layernorm(x)
        return image_embeds


def conditional_generation(config: Any) -> Layout:
    """`Idefics3ForConditionalGeneration` in the stages encoder, connector, embed_tokens and llm."""
    return _layout(config, "idefics3")


def smolvlm(config: Any) -> Layout:
    """`SmolVLMForConditionalGeneration`: the same modules under the same names."""
    return _layout(config, "smolvlm")


def tile_places(side: int) -> Tensor:
    """int64 `[side * side]`: the place of each patch of a whole tile.

    Not 0, 1, 2, ... where transformers' fractions are rounded down to the place before.
    """
    places = place_table(side)[side]
    return (places[:, None] * side + places[None]).flatten()


def _layout(config: Any, kind: str) -> Layout:
    text, vision = tied_text_config(config), config.vision_config
    check_image_token(config, text)
    side = grid_side(vision)
    with torch.device("meta"):
        rows, columns = PixelShuffle((side, side), config.scale_factor).output_grid
    return Layout(
        kind=kind,
        stages={
            "encoder": Stage(lambda: TileEncoder(vision), vision_name, finish=_fill_places),
            "connector": Stage(
                lambda: PixelShuffleLinear((side, side), config.scale_factor, vision.hidden_size, text.hidden_size),
                _PROJECTION.__getitem__,
            ),
            **language_stages(text, **LANGUAGE_MODEL),
        },
        contracts={
            "encoder": StageContract(
                name="encoder",
                inputs=(float_spec("pixel_values", "batch", 3, vision.image_size, vision.image_size),),
                outputs=(float_spec("image_embeds", "batch", side * side, vision.hidden_size),),
                axes=(batch_axis(),),
            ),
            "connector": StageContract(
                name="connector",
                inputs=(float_spec("image_embeds", "batch", side * side, vision.hidden_size),),
                outputs=(float_spec("image_features", "batch", rows * columns, text.hidden_size),),
                axes=(batch_axis(),),
            ),
            **language_contracts(text),
        },
        kv_cache=kv_cache(text),
        text_config=text,
        tied=tied_head(text),
    )


def _fill_places(module: nn.Module) -> None:
    """The places are computed, which the meta device cannot."""
    encoder: Any = module
    encoder.places = tile_places(encoder.side)
