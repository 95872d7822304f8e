"""InternVL checkpoints (Chen et al. 2024, arXiv 2404.16821): InternViT tiles, pixel shuffle and a 2-layer MLP."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError
from .contract import StageContract
from .idefics2 import tied_text_config
from .language import (
    batch_axis,
    check_image_token,
    float_spec,
    kv_cache,
    language_contracts,
    language_stages,
    tied_head,
)
from .llava import LANGUAGE_MODEL, PROJECTOR, RENAMES
from .pixel_shuffle import PixelShuffle, PixelShuffleMlp
from .stages import Layout, Stage
from .vision_tower import selects_patches_only

VISION_TOWER = "model.vision_tower."
_MODULES = {"norm": "layer_norm", "mlp.layers.0": "linear_1", "mlp.layers.1": "linear_2"}


class InternVLEncoder(nn.Module):
    """transformers' `InternVLVisionModel` up to the layer that is used, with eager attention.

    `layer`: which hidden state is given, counted from 0, the embedding; None: the last, behind the final norm if the
    model has one. `skip_first`: leave the class token out.
    """

    def __init__(self, vision_config: Any, layer: int | None, *, skip_first: bool) -> None:
        super().__init__()
        from transformers import InternVLVisionModel

        self.skip_first, self.final_norm = skip_first, layer is None
        config = copy.deepcopy(vision_config)
        config.num_hidden_layers = config.num_hidden_layers if layer is None else layer
        make: Any = InternVLVisionModel  # `_from_config` is not typed
        self.model = make._from_config(config, attn_implementation="eager")
        if not self.final_norm:
            del self.model.layernorm

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` `[B, 3, H, W]` to `image_embeds` `[B, N, Dv]`."""
        embeddings = self.model.embeddings
        patches = embeddings.patch_embeddings(pixel_values)
        x = torch.cat([embeddings.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        if embeddings.position_embeddings is not None:
            x = x + embeddings.position_embeddings
        for layer in self.model.encoder.layer:
            x = layer(x)
        x = self.model.layernorm(x) if self.final_norm else x
        return x[:, 1:] if self.skip_first else x


def conditional_generation(config: Any) -> Layout:
    """`InternVLForConditionalGeneration` in the stages encoder, connector, embed_tokens and llm."""
    text, vision = tied_text_config(config), config.vision_config
    check_image_token(config, text)
    grid, factor, layer = _grid(config), _factor(config), _feature_layer(config)
    with torch.device("meta"):
        rows, columns = PixelShuffle(grid, factor).output_grid
    names = {
        f"{ours}.{part}": f"{PROJECTOR}{theirs}.{part}"
        for ours, theirs in _MODULES.items()
        for part in ("weight", "bias")
    }
    tokens = float_spec("image_embeds", "batch", grid[0] * grid[1], vision.hidden_size)
    return Layout(
        kind="internvl",
        stages={
            "encoder": Stage(
                lambda: InternVLEncoder(vision, layer, skip_first=True),
                lambda name: VISION_TOWER + name.removeprefix("model."),
            ),
            "connector": Stage(
                lambda: PixelShuffleMlp(
                    grid, factor, vision.hidden_size, text.hidden_size, activation=config.projector_hidden_act
                ),
                names.__getitem__,
            ),
            **language_stages(text, **LANGUAGE_MODEL),
        },
        contracts={
            "encoder": StageContract(
                name="encoder",
                inputs=(float_spec("pixel_values", "batch", 3, *vision.image_size),),
                outputs=(tokens,),
                axes=(batch_axis(),),
            ),
            "connector": StageContract(
                name="connector",
                inputs=(tokens,),
                outputs=(float_spec("image_features", "batch", rows * columns, text.hidden_size),),
                axes=(batch_axis(),),
            ),
            **language_contracts(text),
        },
        kv_cache=kv_cache(text),
        text_config=text,
        ignored=frozenset() if layer is None else frozenset(_unused(vision, layer)),
        tied=tied_head(text, **LANGUAGE_MODEL),
        renames=RENAMES,
    )


def _grid(config: Any) -> tuple[int, int]:
    """Rows and columns of patches; a square, because transformers takes the root of their number."""
    vision = config.vision_config
    if vision.model_type != "internvl_vision":
        raise UnsupportedError(
            f"config.json: the vision tower is a {vision.model_type!r}; supported for InternVL is 'internvl_vision'"
        )
    (height, width), (patch_height, patch_width) = vision.image_size, vision.patch_size
    grid = height // patch_height, width // patch_width
    if not selects_patches_only(config) or grid[0] != grid[1]:
        raise CheckpointError(
            f"config.json: {grid[0]} x {grid[1]} patches selected as {config.vision_feature_select_strategy!r} are no "
            "square, which pixel shuffle needs; accepted are square pictures and 'default'"
        )
    return grid


def _factor(config: Any) -> int:
    """Tokens along an edge of the square that becomes one."""
    factor = round(1 / config.downsample_ratio) if config.downsample_ratio > 0 else 0
    # Other fractions are not exact, and transformers divides by them.
    if factor < 1 or factor & (factor - 1) or factor * config.downsample_ratio != 1:
        raise CheckpointError(
            f"config.json: downsample_ratio is {config.downsample_ratio}; accepted are 1, 0.5, 0.25 and so on"
        )
    return factor


def _feature_layer(config: Any) -> int | None:
    """`vision_feature_layer` counted from 0, the embedding; None for -1, which is read behind the final norm."""
    named, total = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if named == -1:
        return None
    layer = named + total + 1 if isinstance(named, int) and named < 0 else named
    if not isinstance(layer, int) or not 0 < layer <= total:
        raise CheckpointError(
            f"config.json: vision_feature_layer is {named}, and the vision tower has {total} layers; accepted is one "
            f"number, {-total} to {total}, behind the embedding"
        )
    return layer


def _unused(vision: Any, layer: int) -> list[str]:
    layers = [f"{VISION_TOWER}encoder.layer.{i}.*" for i in range(layer, vision.num_hidden_layers)]
    return [*layers, f"{VISION_TOWER}layernorm.*"]
