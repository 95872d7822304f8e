"""How good a checkpoint of the small model is: exact matches, and where its queries look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .pictures import Example
from .recipe import Sizes


@dataclass(frozen=True)
class Accuracy:
    """Exact matches. ``misses`` are ``(prompt, expected, got)``."""

    captions: float
    answers: float
    num_captions: int
    num_answers: int
    misses: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Attention:
    """Where the queries look, averaged over pictures, layers, heads and queries.

    ``mass``: the part of the cross-attention that lies on shapes; ``area``: the part of the picture that they
    cover.
    """

    mass: float
    area: float

    @property
    def ratio(self) -> float:
        return self.mass / self.area


def load(checkpoint: Path) -> tuple[Any, Any]:
    """transformers' own ``(model, processor)`` of a checkpoint directory."""
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    model: Any = Blip2ForConditionalGeneration.from_pretrained(checkpoint)
    return model.eval(), Blip2Processor.from_pretrained(checkpoint)


@torch.inference_mode()
def generate_texts(model: Any, processor: Any, images: Sequence[Any], prompts: Sequence[str]) -> list[str]:
    """Greedy texts by transformers' ``generate``; an empty prompt asks for the caption."""
    batch = processor(images=list(images), text=list(prompts), padding=True, return_tensors="pt")
    # Blip2ForConditionalGeneration hands over to its language model, which does not see the outer settings by
    # itself.
    ids = model.generate(**batch, generation_config=model.generation_config)
    new = ids[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def measure_accuracy(model: Any, processor: Any, examples: Sequence[Example], batch: int = 50) -> Accuracy:
    """Caption every picture and ask every one of its questions."""
    asked = [(example.image, "", example.caption) for example in examples]
    captions = len(asked)
    asked += [(e.image, question.prompt, question.answer) for e in examples for question in e.questions]
    got: list[str] = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        got += generate_texts(model, processor, [p[0] for p in part], [p[1] for p in part])
    right = [text == expected for text, (_, _, expected) in zip(got, asked, strict=True)]
    misses = [(p, e, text) for text, (_, p, e), ok in zip(got, asked, right, strict=True) if not ok]
    return Accuracy(
        captions=sum(right[:captions]) / captions,
        answers=sum(right[captions:]) / (len(asked) - captions),
        num_captions=captions,
        num_answers=len(asked) - captions,
        misses=tuple(misses),
    )


@torch.inference_mode()
def measure_attention(model: Any, processor: Any, examples: Sequence[Example]) -> Attention:
    """The queries' cross-attention over the patches (without the class token; the rest sums to 1)."""
    from ..qformer import QFormer, QFormerConfig, transformers_names
    from .data import patch_coverage

    config = model.config
    ours = QFormerConfig.from_transformers(config.qformer_config.to_dict(), config.num_query_tokens)
    qformer = QFormer(ours).eval()
    weights = model.state_dict()
    qformer.load_state_dict({name: weights[theirs] for name, theirs in transformers_names(ours).items()})
    sizes = Sizes(image=config.vision_config.image_size, patch=config.vision_config.patch_size)
    pixels = processor(images=[example.image for example in examples], return_tensors="pt")["pixel_values"]
    image_embeds = model.vision_model(pixels).last_hidden_state
    maps = torch.stack(qformer(image_embeds, with_attention=True).cross_attention)[..., 1:]
    looked = (maps / maps.sum(dim=-1, keepdim=True)).mean(dim=(0, 2, 3))
    covered = torch.stack([patch_coverage(example, sizes).sum(dim=0) for example in examples])
    return Attention(mass=float((looked * covered).sum(dim=1).mean()), area=float(covered.mean()))
