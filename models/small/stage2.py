"""Stage 2 of BLIP-2: Q-Former and projection learn to be a soft prompt for the frozen language model.

Li et al. 2023, arXiv 2301.12597, section 3.3, for a decoder-only model: the projected queries stand before
the text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ..qformer import QFormer
from .language import context_loss
from .packing import pack
from .recipe import Recipe, Sizes
from .scenes import Question, Scene
from .stage1 import Stage1, qformer_config
from .text import QUESTIONS_PER_TEXT, TextCodec, sentences
from .trainer import LossOf


class Stage2(nn.Module):
    """What stage 2 trains: the Q-Former without its text branch, and the projection to the text's width."""

    def __init__(self, sizes: Sizes, vocab_size: int) -> None:
        super().__init__()
        self.qformer = QFormer(qformer_config(sizes, vocab_size, text=False))
        self.projection = nn.Linear(sizes.qformer_width, sizes.text_width)

    def start_from(self, stage1: Stage1, language: LlamaForCausalLM) -> None:
        """Take over stage 1's Q-Former; scale the projection to give vectors as large as words'."""
        mine = self.qformer.state_dict()
        self.qformer.load_state_dict({k: v for k, v in stage1.qformer.state_dict().items() if k in mine})
        words = language.get_parameter("model.embed_tokens.weight").detach()
        nn.init.normal_(self.projection.weight, std=float(words.std()) / self.projection.in_features**0.5)
        nn.init.zeros_(self.projection.bias)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """``[B, N, Dv]`` to the soft prompt ``[B, Q, Dt]``."""
        prompt: Tensor = self.projection(self.qformer(image_embeds).query_embeds)
        return prompt


def stage2_loss(
    model: Stage2,
    language: LlamaForCausalLM,
    features: Tensor,
    scenes: tuple[Scene, ...],
    questions: tuple[tuple[Question, ...], ...],
    codec: TextCodec,
    recipe: Recipe,
) -> LossOf:
    """Some questions and the caption of each picture of a random batch."""
    language.requires_grad_(False)

    def loss_of(generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(scenes), (recipe.stage2.batch,), generator=generator).tolist()
        texts = []
        for row in rows:
            order = torch.randperm(len(questions[row]), generator=generator).tolist()[:QUESTIONS_PER_TEXT]
            texts.append(sentences(codec, scenes[row], [questions[row][i] for i in order]))
        prompt = model(features[rows].float())
        return {"prompted": context_loss(language, prompt, pack(texts, prompt.shape[1]))}

    return loss_of
