"""Variants of the small model that were trained to be reduced, for `benchmarks.reduction`.

"nested": the shipped model, its Q-Former and projection trained on with a random number of queries in every step, so
that the first few learn to do alone (Hu et al. 2024, "Matryoshka Query Transformer", arXiv 2405.19315). "patches": the
shipped encoder and language model with an MLP over the patches between them, a connector of LLaVA's kind that keeps the
grid; every step pools it by a random stride. A few hundred steps each: what a reduction costs shows, the best possible
model does not.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.func import functional_call

from bridgeport.models import load_checkpoint, register_connector
from bridgeport.models.pooling import WindowPooling
from bridgeport.models.projector import MlpProjector
from bridgeport.models.small import checkpoint_path, pictures
from bridgeport.models.small.data import PictureSet, tensorize
from bridgeport.models.small.encoder import encode
from bridgeport.models.small.evaluate import load
from bridgeport.models.small.language import context_loss
from bridgeport.models.small.packing import pack
from bridgeport.models.small.recipe import Schedule, Sizes
from bridgeport.models.small.text import TextCodec, sentences
from bridgeport.models.small.trainer import train

QUERIES = (16, 12, 8, 6, 4, 2, 1)
STRIDES = (1, 2, 2, 5)
PICTURES = 4000
BATCH = 32
CONNECTOR = "small-patch-projector"
# A hundred image tokens and the longest caption.
CONTEXT = 192


def _grid(config: Any) -> int:
    side: int = config.vision_config.image_size // config.vision_config.patch_size
    return side


@register_connector(
    CONNECTOR, architectures=["Blip2ForConditionalGeneration"], tokens=lambda config: _grid(config) ** 2
)
class PatchProjector(nn.Module):
    """LLaVA's projector over a BLIP-2 encoder's patches, `[B, 1 + N, Dv]` to `[B, N, D]`, the class token left out."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.output_grid = (_grid(config),) * 2
        self.projector = MlpProjector((config.vision_config.hidden_size, width, width))

    def forward(self, image_embeds: Tensor) -> Tensor:
        features: Tensor = self.projector(image_embeds[:, 1:])
        return features


class NestedQueries(nn.Module):
    """Q-Former and projection, with as many of the first queries as asked for."""

    def __init__(self, connector: Any) -> None:
        super().__init__()
        self.qformer, self.projection = connector.qformer, connector.language_projection

    def forward(self, image_embeds: Tensor, amount: int) -> Tensor:
        queries = {"query_tokens": self.qformer.query_tokens[:, :amount]}
        features: Tensor = self.projection(functional_call(self.qformer, queries, (image_embeds,)).query_embeds)
        return features


class PooledPatches(nn.Module):
    """The projector, pooled by the stride asked for, and the language model, which is trained with it."""

    def __init__(self, config: Any, language: nn.Module) -> None:
        super().__init__()
        self.connector, self.language = PatchProjector(config), language
        words = language.get_parameter("model.embed_tokens.weight").detach().std()
        last: Any = self.connector.projector.layers[-1]
        nn.init.normal_(last.weight, std=float(words) / last.in_features**0.5)

    def forward(self, image_embeds: Tensor, amount: int) -> Tensor:
        features: Tensor = self.connector(image_embeds)
        pooled: Tensor = WindowPooling(self.connector.output_grid, stride=amount)(features)
        return pooled


def train_variants(out: Path, steps: int, progress: Progress) -> dict[str, Path]:
    """Name -> checkpoint directory; one that is there already is taken as it is."""
    found = {name: out / name for name in ("nested", "patches")}
    if all(path.exists() for path in found.values()):
        return found
    drawn = list(islice(pictures.stream(pictures.TRAIN_SEED, PICTURES), PICTURES))
    shown = tensorize(drawn, Sizes())
    shipped = load_checkpoint(checkpoint_path())
    features = encode(shipped.encoder.model, shown.pixels)  # type: ignore[arg-type]
    for name, make in (("nested", _train_nested), ("patches", _train_patches)):
        if not found[name].exists():
            torch.manual_seed(0)
            make(found[name], shown, features, steps, progress)
    return found


def _train_nested(out: Path, shown: PictureSet, features: Tensor, steps: int, progress: Progress) -> None:
    model, processor = load(checkpoint_path())
    nested = NestedQueries(load_checkpoint(checkpoint_path()).load_stage("connector")).requires_grad_(True)
    language = model.language_model.requires_grad_(False)
    loss_of = _loss(nested, language, processor, shown, features, QUERIES)
    schedule = Schedule(steps=steps, batch=BATCH, learning_rate=5e-4)
    train("nested queries", nested, loss_of, schedule, 0, out.with_suffix(".pt"), progress)
    weights = nested.qformer.state_dict()
    from bridgeport.models.qformer import transformers_names

    names = transformers_names(nested.qformer.config)
    stored = {theirs: weights[ours] for ours, theirs in names.items()}
    stored |= {f"language_projection.{name}": tensor for name, tensor in nested.projection.state_dict().items()}
    model.load_state_dict(model.state_dict() | stored)
    _save(out, model, processor)


def _train_patches(out: Path, shown: PictureSet, features: Tensor, steps: int, progress: Progress) -> None:
    model, processor = load(checkpoint_path())
    model.config.bridgeport_connector = CONNECTOR
    model.config.text_config.max_position_embeddings = CONTEXT
    patches = PooledPatches(model.config, model.language_model.requires_grad_(True))
    loss_of = _loss(patches, patches.language, processor, shown, features, STRIDES)
    schedule = Schedule(steps=steps, batch=BATCH, learning_rate=1e-3)
    train("patch projector", patches, loss_of, schedule, 0, out.with_suffix(".pt"), progress)
    model.connector = patches.connector
    _save(out, model, processor)


def _loss(
    model: nn.Module, language: Any, processor: Any, shown: PictureSet, features: Tensor, amounts: tuple[int, ...]
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """The caption and the questions of each picture of a random batch, at one of `amounts`."""
    codec = TextCodec(processor.tokenizer.backend_tokenizer)

    def loss_of(generator: torch.Generator) -> dict[str, Tensor]:
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        rows = [rng.randrange(len(shown)) for _ in range(BATCH)]
        texts = [sentences(codec, shown.scenes[row], shown.questions[row]) for row in rows]
        prompt = model(features[rows], rng.choice(amounts))
        return {"loss": context_loss(language, prompt, pack(texts, prompt.shape[1]))}

    return loss_of


def _save(out: Path, model: Any, processor: Any) -> None:
    """Beside, then renamed: a directory that is there is whole."""
    beside = out.with_suffix(".partial")
    model.save_pretrained(beside)
    processor.save_pretrained(beside)
    beside.replace(out)
