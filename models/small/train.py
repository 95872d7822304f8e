"""The whole recipe: text, pictures, stage 1, stage 2, one directory. Resumes where it was killed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer
from transformers import Blip2VisionModel, LlamaForCausalLM

from . import pictures
from .assemble import write_checkpoint
from .curves import save_curves
from .data import PictureSet, tensorize
from .encoder import LabelledEncoder, encode, encoder_loss
from .language import language_loss, text_config
from .recipe import Recipe
from .stage1 import Stage1, stage1_loss
from .stage2 import Stage2, stage2_loss
from .text import TextCodec, train_tokenizer
from .trainer import History, train


@dataclass(frozen=True)
class Run:
    """One training run: its recipe, where it keeps its states, and where it shows its progress."""

    recipe: Recipe
    states: Path
    progress: Progress
    histories: dict[str, History]

    def state(self, stage: str) -> Path:
        return self.states / f"{stage}.pt"


def reproduce(recipe: Recipe, out: Path, *, quiet: bool = False) -> Path:
    """Run the recipe and return the checkpoint directory, ``out/checkpoint``.

    Beside it: ``states/`` (one file per stage, from which a killed run goes on) and ``loss-curves.png``.
    """
    # Stages run one after the other, each from its own seed, so a resumed run draws the same initial weights.
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
    ) as progress:
        run = Run(recipe, out / "states", progress, {})
        tokenizer = train_tokenizer(recipe.seed)
        language = train_language(run, tokenizer)
        shown = draw_pictures(run)
        vision = train_encoder(run, shown)
        features = encode(vision, shown.pixels)
        codec = TextCodec(tokenizer)
        stage1 = train_stage1(run, features, shown, codec, language.config.vocab_size)
        stage2 = train_stage2(run, features, shown, codec, stage1, language)
    checkpoint = out / "checkpoint"
    write_checkpoint(checkpoint, recipe.sizes, tokenizer, vision, stage2, language)
    save_curves(run.histories, out / "loss-curves.png")
    return checkpoint


def _seed(run: Run, stage: int) -> int:
    """Seed torch for a stage's initial weights, and return the seed of its batches."""
    seed = 10 * run.recipe.seed + stage
    torch.manual_seed(seed)
    return seed


def train_language(run: Run, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """The language model, on text alone."""
    seed = _seed(run, 0)
    # Rounded up, as real checkpoints do; ids past the tokenizer's are never trained towards.
    vocab_size = -(-tokenizer.get_vocab_size() // 64) * 64
    model = LlamaForCausalLM(text_config(run.recipe.sizes, vocab_size))
    loss_of = language_loss(model, TextCodec(tokenizer), run.recipe)
    run.histories["language model"] = train(
        "language model", model, loss_of, run.recipe.language, seed, run.state("language"), run.progress
    )
    return model


def draw_pictures(run: Run) -> PictureSet:
    """The training pictures."""
    count = run.recipe.pictures
    task = run.progress.add_task("pictures", total=count)
    stream = pictures.stream(pictures.TRAIN_SEED, count)
    parts: list[PictureSet] = []
    while chunk := [example for _, example in zip(range(1000), stream, strict=False)]:
        parts.append(tensorize(chunk, run.recipe.sizes))
        run.progress.update(task, advance=len(chunk))
    return PictureSet.join(parts)


def train_encoder(run: Run, shown: PictureSet) -> Blip2VisionModel:
    """The vision encoder, on the pictures' labels; frozen from here on."""
    seed = _seed(run, 2)
    model = LabelledEncoder(run.recipe.sizes)
    run.histories["vision encoder"] = train(
        "vision encoder",
        model,
        encoder_loss(model, shown, run.recipe),
        run.recipe.encoder,
        seed,
        run.state("encoder"),
        run.progress,
    )
    return model.vision.requires_grad_(False)


def train_stage1(run: Run, features: torch.Tensor, shown: PictureSet, codec: TextCodec, vocab_size: int) -> Stage1:
    """The Q-Former against the frozen encoder."""
    seed = _seed(run, 3)
    model = Stage1(run.recipe.sizes, vocab_size)
    loss_of = stage1_loss(model, features, shown.scenes, codec, run.recipe)
    run.histories["stage 1"] = train(
        "stage 1", model, loss_of, run.recipe.stage1, seed, run.state("stage1"), run.progress
    )
    return model


def train_stage2(
    run: Run,
    features: torch.Tensor,
    shown: PictureSet,
    codec: TextCodec,
    stage1: Stage1,
    language: LlamaForCausalLM,
) -> Stage2:
    """Q-Former and projection against the frozen language model."""
    seed = _seed(run, 4)
    model = Stage2(run.recipe.sizes, language.config.vocab_size)
    model.start_from(stage1, language)
    loss_of = stage2_loss(model, language, features, shown.scenes, shown.questions, codec, run.recipe)
    run.histories["stage 2"] = train(
        "stage 2", model, loss_of, run.recipe.stage2, seed, run.state("stage2"), run.progress
    )
    return model
