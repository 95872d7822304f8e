"""Idefics2 checkpoints (Laurençon et al. 2024, arXiv 2405.02246): pictures of any shape, Perceiver Resampler.

Pictures of a batch are padded to the largest; `pixel_attention_mask` says what is picture. A patch counts when all of
its pixels do. Its place in the position embedding is its place in its own picture, as a fraction of the whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .attention import additive_mask
from .contract import Axis, StageContract, TensorSpec, WholePatches
from .language import batch_axis, check_image_token, float_spec, kv_cache, language_contracts, language_stages
from .perceiver import PerceiverConfig, PerceiverConnector, connector_names
from .stages import Layout, Stage

LANGUAGE_MODEL = {"model": "model.text_model.", "lm_head": "lm_head."}
VISION_MODEL = "model.vision_model."
CONNECTOR = "model.connector."


class PaddedEncoder(nn.Module):
    """transformers' `Idefics2VisionTransformer` for padded pictures, with eager attention.

    Places are looked up and not computed: fractions rounded in another precision would fall into other buckets.
    """

    def __init__(self, vision_config: Any) -> None:
        super().__init__()
        from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

        make: Any = Idefics2VisionTransformer  # `_from_config` is not typed
        self.model = make._from_config(vision_config, attn_implementation="eager")
        self.patch_size, self.side = vision_config.patch_size, grid_side(vision_config)
        self.register_buffer("places", place_table(self.side), persistent=False)

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor) -> Tensor:
        """`[B, 3, H, W]`, int64 `[B, H, W]` (1: picture) to `image_embeds` `[B, H // P * (W // P), Dv]`."""
        embeddings = self.model.embeddings
        complete = complete_patches(pixel_attention_mask, self.patch_size)
        rows = self._places(complete[:, :, 0])[:, :, None]
        columns = self._places(complete[:, 0, :])[:, None, :]
        places = ((rows * self.side + columns) * complete).flatten(1)
        x = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        x = x + embeddings.position_embedding(places)
        mask = additive_mask(complete.flatten(1), x.dtype)
        for layer in self.model.encoder.layers:
            x = layer(x, mask)
        image_embeds: Tensor = self.model.post_layernorm(x)
        return image_embeds

    def _places(self, complete: Tensor) -> Tensor:
        """Along one edge: 1 for each patch that is picture, `[B, n]`, to the places of all of them."""
        table = self.get_buffer("places")[complete.sum(dim=1)]
        return table[:, torch.arange(complete.shape[1], device=table.device)]


class PaddedConnector(nn.Module):
    """The Perceiver connector, its mask made of that of the pixels."""

    def __init__(self, connector: PerceiverConnector, patch_size: int) -> None:
        super().__init__()
        self.connector, self.patch_size = connector, patch_size

    def forward(self, image_embeds: Tensor, pixel_attention_mask: Tensor) -> Tensor:
        """`[B, N, Dv]`, int64 `[B, H, W]`, `N = H // P * (W // P)`, to `image_features` `[B, Q, D]`."""
        complete = complete_patches(pixel_attention_mask, self.patch_size).flatten(1)
        # That there are N of them is known to the caller only: the exporter must not be asked to prove it.
        seen = complete[:, torch.arange(image_embeds.shape[1], device=complete.device)]
        features: Tensor = self.connector(image_embeds, seen)
        return features


def conditional_generation(config: Any) -> Layout:
    """`Idefics2ForConditionalGeneration` in the stages encoder, connector, embed_tokens and llm."""
    text, vision = tied_text_config(config), config.vision_config
    check_image_token(config, text)
    grid_side(vision)
    perceiver = PerceiverConfig.from_idefics2(config.perceiver_config)
    names = {f"connector.{ours}": CONNECTOR + theirs for ours, theirs in connector_names(perceiver).items()}
    return Layout(
        kind="idefics2",
        stages={
            "encoder": Stage(
                lambda: PaddedEncoder(vision), vision_name, finish=_fill_places, examples=_examples(vision)
            ),
            "connector": Stage(
                lambda: PaddedConnector(_connector(config, perceiver), vision.patch_size),
                names.__getitem__,
                examples=_examples(vision),
            ),
            **language_stages(text, **LANGUAGE_MODEL),
        },
        contracts={
            "encoder": _contract(
                "encoder", vision, float_spec("pixel_values", "batch", 3, "height", "width"), _image_embeds(vision)
            ),
            "connector": _contract(
                "connector",
                vision,
                _image_embeds(vision),
                float_spec("image_features", "batch", perceiver.num_latents, text.hidden_size),
            ),
            **language_contracts(text),
        },
        kv_cache=kv_cache(text),
        text_config=text,
        tied=tied_head(text),
    )


def vision_name(name: str) -> str:
    """A weight of an encoder's `model` in the checkpoint."""
    return VISION_MODEL + name.removeprefix("model.")


def tied_text_config(config: Any) -> Any:
    """The text config with what the whole config says about the LM head, which is what counts."""
    text = copy.deepcopy(config.text_config)
    text.tie_word_embeddings = bool(config.tie_word_embeddings)
    return text


def tied_head(text: Any) -> dict[str, str]:
    """For `Layout.tied`."""
    return {"lm_head.weight": "model.text_model.embed_tokens.weight"} if text.tie_word_embeddings else {}


def grid_side(vision: Any) -> int:
    """Places along an edge of the position embedding; CheckpointError where an edge is no one number."""
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise CheckpointError(
                f"config.json: vision_config.{name} is {getattr(vision, name)!r}; this model takes one number"
            )
    side: int = vision.image_size // vision.patch_size
    return side


def place_table(side: int) -> Tensor:
    """int64 `[side + 1, side]`: of a picture with `n` patches along an edge, where the `i`-th is along `side` places.

    The same float operations as transformers' `Idefics2VisionEmbeddings`, whose rounding checkpoints were trained with.
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    steps = 1.0 / torch.arange(side + 1)
    fractions = (torch.arange(side, dtype=torch.float32)[None] * steps[:, None]).nan_to_num(0.0)
    return torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True)


def complete_patches(pixel_attention_mask: Tensor, patch_size: int) -> Tensor:
    """int64 `[B, H, W]` to int64 `[B, H // P, W // P]`: 1 where all pixels of a patch are picture."""
    padding = (1 - pixel_attention_mask)[:, None].float()
    return 1 - F.max_pool2d(padding, patch_size)[:, 0].long()


def _connector(config: Any, perceiver: PerceiverConfig) -> PerceiverConnector:
    return PerceiverConnector(
        perceiver,
        encoder_width=config.vision_config.hidden_size,
        intermediate_width=config.text_config.intermediate_size,
        activation=config.text_config.hidden_act,
    )


def _fill_places(module: nn.Module) -> None:
    """The table is computed, which the meta device cannot."""
    encoder: Any = module
    encoder.places = place_table(encoder.side)


def _image_embeds(vision: Any) -> TensorSpec:
    return float_spec("image_embeds", "batch", "tokens", vision.hidden_size)


def _contract(name: str, vision: Any, first: TensorSpec, output: TensorSpec) -> StageContract:
    """Both stages read the mask; the picture's edges go up to what the position embedding covers."""
    patch, edge = vision.patch_size, vision.image_size
    mask = TensorSpec(name="pixel_attention_mask", dtype="int64", shape=("batch", "height", "width"))
    edges = [Axis(name=axis, min=patch, opt=edge, max=edge) for axis in ("height", "width")]
    most, counted = grid_side(vision) ** 2, WholePatches(edges=("height", "width"), size=patch)
    tokens = Axis(name="tokens", min=1, opt=most, max=most, patches=counted)
    return StageContract(name=name, inputs=(first, mask), outputs=(output,), axes=(batch_axis(), *edges, tokens))


def _examples(vision: Any) -> Any:
    """Padded pictures of some patches and a rest, the first of them whole."""

    def make(sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        batch, patch, side = sizes["batch"], vision.patch_size, grid_side(vision)
        rows, columns = min(side, 1 + batch), min(side, 2 + batch % 3)
        height, width = (min(n * patch + patch // 2, vision.image_size) for n in (rows, columns))
        mask = torch.ones(batch, height, width, dtype=torch.int64)
        for i in range(1, batch):
            mask[i, max(1, rows - i % rows) * patch :] = 0
            mask[i, :, max(1, columns - i % columns) * patch + 1 :] = 0
        tokens = (height // patch) * (width // patch)
        return {
            "pixel_values": torch.randn(batch, 3, height, width, generator=generator) * mask[:, None],
            "pixel_attention_mask": mask,
            "image_embeds": torch.randn(batch, tokens, vision.hidden_size, generator=generator),
        }

    return make
