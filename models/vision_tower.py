"""CLIP and SigLIP vision transformers as LLaVA and its relatives use them: the hidden states of chosen layers.

Neither the last layers, nor the final LayerNorm, nor the pooling head take part, so they are not built.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError
from .contract import StageContract
from .language import batch_axis, float_spec
from .stages import Stage

# model_type -> its class in transformers, and whether a class token comes first.
VISION_TOWERS = {"clip_vision_model": ("CLIPVisionModel", True), "siglip_vision_model": ("SiglipVisionModel", False)}
SELECTIONS = ("default", "full")


class VisionTower(nn.Module):
    """transformers' vision model up to the last layer that is used, with eager attention.

    `layers`: which hidden states are given, side by side: 0 is the embedding, `i` the output of the `i`-th layer.
    `skip_first`: leave the first token, the class token, out.
    """

    def __init__(self, vision_config: Any, layers: tuple[int, ...], *, skip_first: bool) -> None:
        super().__init__()
        import transformers

        self.layers, self.skip_first = layers, skip_first
        config = copy.deepcopy(vision_config)
        config.num_hidden_layers = max(layers)
        name, _ = VISION_TOWERS[config.model_type]
        if config.model_type == "siglip_vision_model":
            config.vision_use_head = False
        self.model: Any = getattr(transformers, name)._from_config(config, attn_implementation="eager")
        del self.model.post_layernorm

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` `[B, 3, H, W]` to `image_embeds` `[B, N, Dv * len(layers)]`."""
        x = self.model.embeddings(pixel_values)
        if hasattr(self.model, "pre_layrnorm"):
            x = self.model.pre_layrnorm(x)
        states = [x]
        for layer in self.model.encoder.layers:
            states.append(layer(states[-1], attention_mask=None))
        image_embeds = torch.cat([states[i] for i in self.layers], dim=-1) if len(self.layers) > 1 else states[-1]
        return image_embeds[:, 1:] if self.skip_first else image_embeds


def vision_tower(config: Any, *, prefix: str) -> tuple[Stage, StageContract, frozenset[str]]:
    """The encoder stage of a checkpoint that has `vision_feature_layer` and `vision_feature_select_strategy`.

    `prefix`: where its weights are, say "model.vision_tower.". Also gives the contract, and patterns of the stored
    tensors that the chosen layers leave unused. Raises UnsupportedError for another vision tower or selection.
    """
    vision = config.vision_config
    if vision.model_type not in VISION_TOWERS:
        raise UnsupportedError(
            f"config.json: the vision tower is a {vision.model_type!r}; supported are {', '.join(VISION_TOWERS)}"
        )
    layers = feature_layers(config)
    skip_first = selects_patches_only(config)
    side: int = vision.image_size // vision.patch_size
    tokens = side * side + VISION_TOWERS[vision.model_type][1] - skip_first
    contract = StageContract(
        name="encoder",
        inputs=(float_spec("pixel_values", "batch", 3, vision.image_size, vision.image_size),),
        outputs=(float_spec("image_embeds", "batch", tokens, vision.hidden_size * len(layers)),),
        axes=(batch_axis(),),
    )
    stage = Stage(
        lambda: VisionTower(vision, layers, skip_first=skip_first),
        lambda name: prefix + name.removeprefix("model."),
        finish=_fill_position_ids,
    )
    return stage, contract, frozenset(_unused(vision, layers, prefix))


def feature_layers(config: Any) -> tuple[int, ...]:
    """`vision_feature_layer` counted from 0, the embedding; CheckpointError for a layer that the tower lacks."""
    named = config.vision_feature_layer
    total: int = config.vision_config.num_hidden_layers
    wanted = [named] if isinstance(named, int) else list(named)
    layers = tuple(layer if layer >= 0 else total + 1 + layer for layer in wanted)
    if not layers or not all(0 <= layer <= total for layer in layers) or max(layers) == 0:
        raise CheckpointError(
            f"config.json: vision_feature_layer is {named}, and the vision tower has {total} layers; accepted are "
            f"{-total} to {total}, at least one of them behind the embedding"
        )
    return layers


def selects_patches_only(config: Any) -> bool:
    """Whether `vision_feature_select_strategy` leaves the first token out."""
    strategy = config.vision_feature_select_strategy
    if strategy not in SELECTIONS:
        raise UnsupportedError(
            f"config.json: vision_feature_select_strategy is {strategy!r}; accepted are {', '.join(SELECTIONS)}"
        )
    return bool(strategy == "default")


def _unused(vision: Any, layers: tuple[int, ...], prefix: str) -> Iterator[str]:
    for i in range(max(layers), vision.num_hidden_layers):
        yield f"{prefix}encoder.layers.{i}.*"
    yield f"{prefix}post_layernorm.*"
    yield f"{prefix}head.*"
    yield f"{prefix}embeddings.position_ids"


def _fill_position_ids(module: nn.Module) -> None:
    """Positions are a buffer that is not stored, and the meta device computed none."""
    embeddings: Any = module.model.embeddings  # type: ignore[union-attr]  # a VisionTower
    embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
