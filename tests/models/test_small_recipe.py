"""The recipe end to end on a toy configuration: it writes a checkpoint, and a killed run ends as an unbroken one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor, nn

from bridgeport.errors import InputError
from bridgeport.models.small import stage1, trainer
from bridgeport.models.small import train as recipe_module
from bridgeport.models.small.data import pixel_values, tensorize
from bridgeport.models.small.encoder import mirrored, position_embeddings
from bridgeport.models.small.evaluate import generate_texts, load, measure_attention
from bridgeport.models.small.pictures import generate
from bridgeport.models.small.recipe import Recipe, Schedule, Sizes
from bridgeport.models.small.train import reproduce

SCHEDULE = Schedule(steps=4, batch=4, learning_rate=1e-3)
TOY = Recipe(
    pictures=12,
    sizes=Sizes(
        image=32,
        vision_width=32,
        vision_layers=1,
        qformer_width=32,
        qformer_layers=1,
        text_width=32,
        text_layers=1,
        text_heads=2,
        text_key_value_heads=1,
        contrast_width=16,
        head_width=16,
    ),
    language=SCHEDULE,
    encoder=SCHEDULE,
    stage1=SCHEDULE,
    stage2=SCHEDULE,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small take longer to share out among threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Killed(BaseException):
    """Stands for a kill: nothing in the recipe may catch it."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reproduce(TOY, tmp_path_factory.mktemp("unbroken"), quiet=True)


def weights(checkpoint: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


def test_writes_what_transformers_loads_and_generates_with(unbroken: Path) -> None:
    model, processor = load(unbroken)
    example = generate(5, 1)[0]
    prompts = ["", example.questions[0].prompt]
    texts = generate_texts(model, processor, [example.image] * 2, prompts)
    assert len(texts) == 2
    batch = processor(images=[example.image] * 2, text=prompts, padding=True, return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_index).sum(dim=1).tolist() == [16, 16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id == 2
    assert 0 < measure_attention(model, processor, [example]).ratio < 20
    with Image.open(unbroken.parent / "loss-curves.png") as curves:
        assert curves.width > 1000


def test_every_stage_moves_only_its_own_weights(unbroken: Path) -> None:
    """The language model and the encoder in the checkpoint are those of their own stages: frozen afterwards."""
    states = unbroken.parent / "states"
    written = weights(unbroken)
    for stage, prefix, own in (("language", "language_model.", ""), ("encoder", "vision_model.", "vision.")):
        trained = torch.load(states / f"{stage}.pt", weights_only=True)["model"]
        for key, value in trained.items():
            name = prefix + key.removeprefix(own)
            if key.startswith(own) and name in written:
                assert torch.equal(written[name], value), key
    stage1 = torch.load(states / "stage1.pt", weights_only=True)["model"]
    assert not torch.equal(written["query_tokens"], stage1["qformer.query_tokens"])


def test_killed_run_resumes_to_the_same_weights(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of stage 1, after a save; started again; equal to the unbroken run, bit by bit."""
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", 0.0)
    real = stage1.stage1_loss

    def killing(*arguments: Any) -> trainer.LossOf:
        loss_of, calls = real(*arguments), []

        def wrapped(generator: torch.Generator) -> dict[str, Tensor]:
            calls.append(1)
            if len(calls) == 3:
                raise Killed
            return loss_of(generator)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(recipe_module, "stage1_loss", killing)
        with pytest.raises(Killed):
            reproduce(TOY, tmp_path, quiet=True)
    assert torch.load(tmp_path / "states" / "stage1.pt", weights_only=True)["step"] == 2
    resumed = reproduce(TOY, tmp_path, quiet=True)
    want, got = weights(unbroken), weights(resumed)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_state_written_half_is_never_read(tmp_path: Path) -> None:
    """The trainer writes beside and renames: a partial file from a kill during the save is ignored."""
    state = tmp_path / "run.pt"
    state.with_suffix(".partial").write_bytes(b"half")
    model = nn.Linear(2, 1)

    def loss_of(generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": model(torch.randn(4, 2, generator=generator)).square().mean()}

    history = trainer.train("toy", model, loss_of, SCHEDULE, 0, state, Progress(disable=True))
    assert len(history["loss"]) == 4
    assert state.exists()


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    schedule = Schedule(steps=100, batch=2, learning_rate=1.0, warmup=0.1)
    rates = [trainer.rate_at(step, schedule) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] < 1e-3


def test_pictures_become_what_the_processor_makes_of_them(unbroken: Path) -> None:
    _, processor = load(unbroken)
    examples = generate(11, 6)
    want = processor(images=[e.image for e in examples], return_tensors="pt")["pixel_values"]
    got = pixel_values(tensorize(examples, TOY.sizes).pixels)
    # FP32 rounding alone; another resize filter differs by more than 0.1.
    assert (got - want).abs().max() < 1e-5


def test_patch_labels_lie_where_the_shapes_are() -> None:
    sizes = Sizes()
    examples = generate(11, 20)
    shown = tensorize(examples, sizes)
    grid = sizes.image // sizes.patch
    for i, example in enumerate(examples):
        labelled = (shown.kinds[i] > 0).view(grid, grid).nonzero().tolist()
        assert labelled
        centres = {((r + 0.5) / grid * 3 // 1, (c + 0.5) / grid * 3 // 1) for r, c in labelled}
        cells = {(float(s.cell // 3), float(s.cell % 3)) for s in example.scene.shapes}
        assert centres == cells
    assert torch.equal(shown.kinds > 0, shown.colors > 0)


def test_mirrored_pictures_have_mirrored_labels() -> None:
    """As if the mirrored picture had been labelled from scratch; unmirrored rows stay as they are."""
    sizes = Sizes()
    examples = generate(11, 4)
    turned = []
    for example in examples:
        shapes = tuple(replace(s, cell=s.cell // 3 * 3 + 2 - s.cell % 3) for s in example.scene.shapes)
        scene = replace(example.scene, shapes=shapes)
        image = example.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        turned.append(replace(example, image=image, scene=scene, mask=example.mask[:, ::-1]))
    plain, want = tensorize(examples, sizes), tensorize(turned, sizes)
    pixels, labels = mirrored(plain, torch.arange(4), torch.tensor([True, False, True, True]))
    for row, source in enumerate((want, plain, want, want)):
        # Resizing and mirroring commute up to the rounding of a pixel, and of a mask's edge.
        assert (pixels[row].int() - source.pixels[row].int()).abs().max() <= 1
        for name in ("kinds", "colors", "cells"):
            same = (labels[name][row] == getattr(source, name)[row]).float().mean()
            assert same >= 0.97, (name, row)
    unturned = (labels["cells"] == plain.cells).all(dim=1)
    assert unturned.tolist() == [False, True, False, False], "labels left as they were go unseen"


def test_neighbouring_patches_start_alike() -> None:
    sizes = Sizes()
    grid = sizes.image // sizes.patch
    table = position_embeddings(sizes).view(grid, grid, -1)
    near, far = (table[5, 5] - table[5, 6]).norm(), (table[5, 5] - table[5, 9]).norm()
    assert near < far


def test_sizes_refuse_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="image size 90 is no multiple of the patch size 8"):
        Sizes(image=90, patch=8)
    with pytest.raises(InputError, match="queries is 0"):
        Sizes(queries=0)
    with pytest.raises(InputError, match="batch >= 2"):
        Schedule(steps=1, batch=1, learning_rate=1.0)
