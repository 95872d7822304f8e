"""Stage 1 of BLIP-2: the Q-Former learns, against the frozen encoder, what text says about pictures.

Three losses (Li et al. 2023, arXiv 2301.12597, section 3.2; hard negatives as in ALBEF, arXiv 2107.07651):
ITC contrasts pictures with captions, ITM tells matching pairs from hard non-matching ones, ITG writes the
caption.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..qformer import QFormer, QFormerConfig, SelfAttentionMask
from .data import pad
from .language import completion_loss
from .recipe import Recipe, Sizes
from .scenes import Scene
from .text import BOS_ID, EOS_ID, MAX_TEXT_TOKENS, PAD_ID, TextCodec
from .trainer import LossOf


def qformer_config(sizes: Sizes, vocab_size: int, *, text: bool) -> QFormerConfig:
    return QFormerConfig(
        num_query_tokens=sizes.queries,
        hidden_size=sizes.qformer_width,
        num_layers=sizes.qformer_layers,
        num_heads=sizes.qformer_width // sizes.head_width,
        intermediate_size=2 * sizes.qformer_width,
        encoder_hidden_size=sizes.vision_width,
        cross_attention_frequency=2,
        text=text,
        vocab_size=vocab_size,
        max_position_embeddings=MAX_TEXT_TOKENS,
        pad_token_id=PAD_ID,
    )


class Stage1(nn.Module):
    """The Q-Former and the heads of the three losses (only the Q-Former goes on to stage 2)."""

    def __init__(self, sizes: Sizes, vocab_size: int) -> None:
        super().__init__()
        self.qformer = QFormer(qformer_config(sizes, vocab_size, text=True))
        self.vision_projection = nn.Linear(sizes.qformer_width, sizes.contrast_width)
        self.text_projection = nn.Linear(sizes.qformer_width, sizes.contrast_width)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.itm_head = nn.Linear(sizes.qformer_width, 2)
        self.itg_head = nn.Linear(sizes.qformer_width, vocab_size)
        for embedding in (self.qformer.word_embeddings, self.qformer.position_embeddings):
            assert embedding is not None
            nn.init.normal_(embedding.weight, std=0.02)

    def similarities(self, image_embeds: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        """ITC's logits ``[B, B]``, pictures by captions: the best query's cosine, over the temperature.

        ``image_embeds`` ``[B, N, Dv]``, ``ids`` and ``keep`` ``[B, T]``. Unimodal: the two sides run apart,
        which is what the unimodal mask amounts to, without the cost of its masked quarter.
        """
        queries = self.qformer(image_embeds).query_embeds
        words = self.qformer(input_ids=ids, text_attention_mask=keep).text_embeds
        pictures = F.normalize(self.vision_projection(queries), dim=-1)
        captions = F.normalize(self.text_projection(words[:, 0]), dim=-1)
        best = torch.einsum("iqd,jd->ijq", pictures, captions).amax(dim=-1)
        return best / self.temperature.clamp(0.01, 0.5)

    def matching(self, image_embeds: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        """ITM's logits ``[B, 2]`` (no match, match): the mean over the queries, which see the text."""
        out = self.qformer(image_embeds, ids, keep, mask=SelfAttentionMask.BIDIRECTIONAL)
        logits: Tensor = self.itm_head(out.query_embeds).mean(dim=1)
        return logits

    def generation(self, image_embeds: Tensor, ids: Tensor) -> Tensor:
        """ITG's next-token logits ``[B, T, V]``. Padding is on the right, where no one looks."""
        out = self.qformer(image_embeds, ids, mask=SelfAttentionMask.MULTIMODAL_CAUSAL)
        logits: Tensor = self.itg_head(out.text_embeds)
        return logits


def contrast_loss(similarities: Tensor, same: Tensor) -> Tensor:
    """ITC both ways. ``same`` bool ``[B, B]``: which captions are equal (they share the target)."""
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(similarities, target) + F.cross_entropy(similarities.T, target)) / 2


def hard_negatives(similarities: Tensor, same: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For every picture a wrong caption, for every caption a wrong picture, both int64 ``[B]``.

    Drawn in proportion to the ITC softmax; never a pair whose captions are equal.
    """
    allowed = ~same

    def draw(logits: Tensor) -> Tensor:
        weights = logits.softmax(dim=1).clamp_min(1e-6) * allowed
        return torch.multinomial(weights, 1, generator=generator)[:, 0]

    scores = similarities.detach()
    return draw(scores), draw(scores.T)


def match_loss(
    model: Stage1, image_embeds: Tensor, ids: Tensor, keep: Tensor, negatives: tuple[Tensor, Tensor]
) -> Tensor:
    """ITM over the B true pairs, B pictures with wrong captions and B captions with wrong pictures."""
    wrong_text, wrong_image = negatives
    rows = torch.arange(len(ids))
    images = torch.cat([rows, rows, wrong_image])
    texts = torch.cat([rows, wrong_text, rows])
    labels = (torch.arange(3 * len(ids)) < len(ids)).long()
    return F.cross_entropy(model.matching(image_embeds[images], ids[texts], keep[texts]), labels)


def stage1_loss(model: Stage1, features: Tensor, scenes: tuple[Scene, ...], codec: TextCodec, recipe: Recipe) -> LossOf:
    """ITC + ITM + ITG of a random batch. ``features`` ``[N, 1 + P, Dv]``: the frozen encoder's tokens."""

    def loss_of(generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(scenes), (recipe.stage1.batch,), generator=generator)
        captions = [scenes[row].caption for row in rows.tolist()]
        image_embeds = features[rows].float()
        ids = pad([[BOS_ID, *codec.ids(caption), EOS_ID] for caption in captions])
        keep = ids != PAD_ID
        same = torch.tensor([[a == b for b in captions] for a in captions])
        similarities = model.similarities(image_embeds, ids, keep)
        negatives = hard_negatives(similarities, same, generator)
        return {
            "itc": contrast_loss(similarities, same),
            "itm": match_loss(model, image_embeds, ids, keep, negatives),
            "itg": completion_loss(model.generation(image_embeds, ids), torch.where(keep, ids, -100)),
        }

    return loss_of
