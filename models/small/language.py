"""The Llama-type language model and its training on text alone."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .packing import Packed, pack
from .recipe import Recipe, Sizes
from .text import BOS_ID, EOS_ID, PAD_ID, TextCodec, training_text
from .trainer import LossOf

# Noise on the context's embeddings, in their standard deviations (cf. NEFTune, arXiv 2310.05914): what the
# Q-Former puts there in stage 2 never lies exactly on a word.
CONTEXT_NOISE = 0.3


def text_config(sizes: Sizes, vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.text_width,
        intermediate_size=2 * sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        num_key_value_heads=sizes.text_key_value_heads,
        max_position_embeddings=128,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        initializer_range=0.06,
        tie_word_embeddings=False,
    )


def completion_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the next token. ``logits`` ``[B, T, V]``, ``labels`` ``[B, T]``, -100 not counted."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def context_loss(model: Any, context: Tensor, packed: Packed) -> Tensor:
    """Cross-entropy of the completions that follow a context of embeddings ``[B, C, D]``."""
    embeds = torch.cat([context, model.get_input_embeddings()(packed.ids)], dim=1)
    out = model(
        inputs_embeds=embeds, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
    )  # The context's last token is not counted: it would predict <s>, whose label is -100.
    return completion_loss(out.logits[:, context.shape[1] :], packed.labels)


def language_loss(model: LlamaForCausalLM, codec: TextCodec, recipe: Recipe) -> LossOf:
    """The loss of one batch of texts, each a context of ``queries`` tokens and then a sentence."""
    slots = recipe.sizes.queries

    def loss_of(generator: torch.Generator) -> dict[str, Tensor]:
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        texts = [training_text(codec, rng, slots) for _ in range(recipe.language.batch)]
        # <pad> fills the bags: its embedding is zero and stays so.
        context = model.get_input_embeddings()(torch.tensor([facts for facts, _ in texts])).sum(dim=2)
        noise = torch.randn(context.shape, generator=generator) * context.detach().std() * CONTEXT_NOISE
        packed = pack([sentences for _, sentences in texts], slots)
        return {"text": context_loss(model, context + noise, packed)}

    return loss_of
