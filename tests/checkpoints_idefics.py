"""Small random checkpoints of Idefics (Flamingo), as transformers writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn

from tests.checkpoints import randomize, write_tokenizer

FAKE_TOKEN = "<fake_token_around_image>"

# One entry per configuration that tests run through.
IDEFICS_CONFIGS: dict[str, dict[str, Any]] = {
    "small": {"seed": 1, "num_layers": 2, "vision_layers": 1, "depth": 1},
    "normed": {"seed": 6},
    "plain": {"seed": 2, "qk_layer_norms": False, "qk_layer_norms_perceiver": True, "tie": True},
    "odd": {
        "seed": 3,
        "hidden_size": 72,
        "num_heads": 3,
        "num_layers": 3,
        "interval": 1,
        "alpha_type": "vector",
        "latents": 7,
        "depth": 1,
        "perceiver_heads": 3,
        "perceiver_head_dim": 5,
        "embed_dim": 20,
        "vision_heads": 2,
        "image_size": 35,
        "extra_vocab": 5,
    },
    "narrow": {"seed": 4, "hidden_size": 16, "num_heads": 2, "num_layers": 4, "interval": 4, "latents": 1},
}


@dataclass(frozen=True, kw_only=True)
class IdeficsSpec:
    """Sizes. `interval`: cross-attention stands before every so many layers. `extra_vocab`: rows of the added table
    beyond the tokenizer's two added words.
    """

    seed: int = 0
    hidden_size: int = 64
    intermediate_size: int = 96
    num_heads: int = 4
    num_layers: int = 4
    interval: int = 2
    qk_layer_norms: bool = True
    alpha_type: str = "float"
    tie: bool = False
    latents: int = 4
    depth: int = 2
    perceiver_heads: int = 2
    perceiver_head_dim: int = 8
    qk_layer_norms_perceiver: bool = False
    embed_dim: int = 32
    vision_heads: int = 4
    vision_layers: int = 2
    image_size: int = 28
    patch_size: int = 7
    extra_vocab: int = 0
    max_position_embeddings: int = 128
    use_resampler: bool = True


def write_idefics_checkpoint(directory: Path, **options: Any) -> Path:
    """Write a random `IdeficsForVisionText2Text` to `directory` (made if absent) and return it.

    `options` are the fields of `IdeficsSpec`.
    """
    import transformers as t
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    spec = IdeficsSpec(**options)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(directory, text="llama")
    # As in the real one: <fake_token_around_image> and <image> are the last words, in the added table.
    make_token: Any = AddedToken
    tokenizer.add_tokens([make_token(FAKE_TOKEN, special=True, normalized=False)], special_tokens=True)
    model: Any = t.IdeficsForVisionText2Text(_config(spec, tokenizer))
    randomize(model, spec.seed)
    _open_gates(model, spec.seed)
    model.save_pretrained(directory)
    make_processor: Any = t.IdeficsProcessor
    make_processor(IdeficsImageProcessorPil(image_size=spec.image_size), tokenizer).save_pretrained(directory)
    return directory


def _config(spec: IdeficsSpec, tokenizer: Any) -> Any:
    import transformers as t

    make: Any = t.IdeficsConfig
    return make(
        vocab_size=len(tokenizer) - 2,
        additional_vocab_size=2 + spec.extra_vocab,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        cross_layer_interval=spec.interval,
        qk_layer_norms=spec.qk_layer_norms,
        alpha_type=spec.alpha_type,
        tie_word_embeddings=spec.tie,
        use_resampler=spec.use_resampler,
        max_position_embeddings=spec.max_position_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        vision_config={
            "embed_dim": spec.embed_dim,
            "intermediate_size": 40,
            "num_attention_heads": spec.vision_heads,
            "num_hidden_layers": spec.vision_layers,
            "image_size": spec.image_size,
            "patch_size": spec.patch_size,
        },
        perceiver_config={
            "use_resampler": spec.use_resampler,
            "resampler_n_latents": spec.latents,
            "resampler_depth": spec.depth,
            "resampler_n_heads": spec.perceiver_heads,
            "resampler_head_dim": spec.perceiver_head_dim,
            "qk_layer_norms_perceiver": spec.qk_layer_norms_perceiver,
        },
    )


def _open_gates(model: nn.Module, seed: int) -> None:
    """A gate near 0 would hide whatever stands behind it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha_" in name:
                parameter.copy_(0.6 + 0.3 * torch.rand(parameter.shape, generator=generator))
