"""What models with one encoder for pictures and one for texts have in common (CLIP, SigLIP): contracts and the towers.

Both towers end in a vector of length 1, so that a product is a cosine (Radford et al. 2021, arXiv 2103.00020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError
from .contract import Axis, StageContract, TensorSpec
from .language import batch_axis, float_spec

# Of the longest text that an example has padding behind; the rest of its row is words.
_MOST_PADDING = 3


class TextTower(nn.Module):
    """transformers' text model up to its last LayerNorm, with eager attention, and the projection behind it.

    A subclass says who sees whom (`keep`) and which position stands for the text (`pool`).
    """

    def __init__(self, model_class: Any, text_config: Any, projection: nn.Linear) -> None:
        super().__init__()
        self.model = model_class._from_config(text_config, attn_implementation="eager")
        self.projection = projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`input_ids` and `attention_mask` (1 for tokens, 0 for padding) `[B, L]` int64 to `[B, P]` of length 1."""
        from .attention import additive_mask

        hidden = self.model.embeddings(input_ids=input_ids)
        mask = additive_mask(self.keep(attention_mask), hidden.dtype)
        hidden = self.model.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        pooled = self.pool(self.model.final_layer_norm(hidden), input_ids)
        return F.normalize(self.projection(pooled), dim=-1)

    def keep(self, attention_mask: Tensor) -> Tensor:
        """Which positions may be seen: `[B, L]`, or `[B, L, L]` where rows see columns."""
        raise NotImplementedError

    def pool(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """`[B, L, D]` to `[B, D]`."""
        raise NotImplementedError


def restore_position_ids(module: nn.Module) -> None:
    """For `Stage.finish`: positions are no weights, so transformers' `embeddings.position_ids` are still on meta."""
    model: Any = module.get_submodule("model")
    count = model.embeddings.position_embedding.num_embeddings
    model.embeddings.position_ids = torch.arange(count)[None]


def check_config(config: Any, *, vision: str, text: str) -> None:
    """Raise UnsupportedError for towers that are not `vision` and `text`, CheckpointError for sizes that do not fit."""
    for key, accepted in (("vision_config", vision), ("text_config", text)):
        if (came := getattr(config, key).model_type) != accepted:
            raise UnsupportedError(f"config.json: {key} is of model_type {came!r}; built so far is {accepted}")
    sizes = config.vision_config
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(sizes, name), int):
            raise CheckpointError(f"config.json: vision_config.{name} is {getattr(sizes, name)!r}; give one number")
    if sizes.num_channels != 3:
        raise UnsupportedError(f"config.json: vision_config.num_channels is {sizes.num_channels}; pictures are RGB, 3")
    if sizes.patch_size > sizes.image_size:
        raise CheckpointError(
            f"config.json: patches of {sizes.patch_size} pixels do not fit a picture of {sizes.image_size}; correct "
            "vision_config"
        )


def contracts(config: Any, *, extra_tokens: int, width: int) -> dict[str, StageContract]:
    """Of encoder, connector and text_encoder.

    `extra_tokens`: how many the encoder has beside those of the patches. `width`: of the vectors that are compared.
    """
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + extra_tokens
    image_embeds = float_spec("image_embeds", "batch", tokens, vision.hidden_size)
    return {
        "encoder": StageContract(
            name="encoder",
            inputs=(float_spec("pixel_values", "batch", 3, vision.image_size, vision.image_size),),
            outputs=(image_embeds,),
            axes=(batch_axis(),),
        ),
        "connector": StageContract(
            name="connector",
            inputs=(image_embeds,),
            outputs=(float_spec("image_features", "batch", width),),
            axes=(batch_axis(),),
        ),
        "text_encoder": text_encoder_contract(config.text_config.max_position_embeddings, width),
    }


def text_encoder_contract(max_length: int, width: int) -> StageContract:
    """`input_ids`, `attention_mask` `[B, L]` to `text_features` `[B, width]`."""
    return StageContract(
        name="text_encoder",
        inputs=text_inputs(),
        outputs=(float_spec("text_features", "batch", width),),
        axes=(batch_axis(), text_axis(max_length)),
    )


def text_inputs() -> tuple[TensorSpec, ...]:
    """`input_ids` and `attention_mask`, `[batch, sequence]`."""
    return tuple(
        TensorSpec(name=name, dtype="int64", shape=("batch", "sequence")) for name in ("input_ids", "attention_mask")
    )


def text_axis(max_length: int) -> Axis:
    """The tokens of a text, special ones and padding included."""
    return Axis(name="sequence", min=1, opt=min(16, max_length), max=max_length)


def text_examples(sizes: Mapping[str, int], generator: torch.Generator, *, vocab_size: int) -> dict[str, Tensor]:
    """Random words `[batch, sequence]`, rows right-padded by different lengths."""
    batch, length = sizes["batch"], sizes["sequence"]
    ids = torch.randint(0, vocab_size, (batch, length), generator=generator)
    padding = torch.arange(batch) % (min(_MOST_PADDING, length - 1) + 1)
    mask = torch.arange(length)[None] < (length - padding)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def prefixed(names: Mapping[str, str]) -> Callable[[str], str]:
    """Names of a stage to those of the checkpoint: the first prefix of `names` that fits is replaced."""

    def stored(name: str) -> str:
        for ours, theirs in names.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        raise KeyError(name)

    return stored
