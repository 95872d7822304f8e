"""One training loop for all stages: progress bar, learning-rate schedule, checkpoints that resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

from .recipe import Schedule

# Loss of one step by name; the batch comes from the generator, so a step depends on its number alone.
LossOf = Callable[[torch.Generator], dict[str, Tensor]]
History = dict[str, list[float]]
SAVE_EVERY_SECONDS = 20.0


def rate_at(step: int, schedule: Schedule) -> float:
    """Learning rate: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(schedule.warmup * schedule.steps))
    if step < warmup:
        return schedule.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, schedule.steps - warmup)
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def optimizer_of(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW as BLIP-2 (betas 0.9, 0.98); norms and biases are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98))


def train(
    name: str,
    model: nn.Module,
    loss_of: LossOf,
    schedule: Schedule,
    seed: int,
    state: Path,
    progress: Progress,
) -> History:
    """Train ``model`` in place to the end of ``schedule`` and return its losses by step.

    ``state`` is the file that holds the run: read if there, so a killed run goes on where it was last saved
    and ends with the same weights as one that was never killed. The sum of the losses that ``loss_of``
    returns is minimised.
    """
    optimizer = optimizer_of(model, schedule)
    history: History = {}
    first = _restore(state, model, optimizer, history)
    task = progress.add_task(name, total=schedule.steps, completed=first)
    model.train()
    saved = time.monotonic()
    for step in range(first, schedule.steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        losses = loss_of(generator)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, schedule)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for key, value in losses.items():
            history.setdefault(key, []).append(float(value.detach()))
        told = " ".join(f"{key} {values[-1]:.3f}" for key, values in history.items())
        progress.update(task, advance=1, description=f"{name}: {told}")
        if time.monotonic() - saved > SAVE_EVERY_SECONDS:
            _save(state, step + 1, model, optimizer, history)
            saved = time.monotonic()
    if first < schedule.steps:
        _save(state, schedule.steps, model, optimizer, history)
    model.eval()
    return history


def _save(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, history: History) -> None:
    """Write beside, then rename: a kill in between leaves the last whole state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
    }
    torch.save(state, beside)
    beside.replace(path)


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: History) -> int:
    """The step to go on from; 0 when there is nothing to resume."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    history.update(state["history"])
    step: int = state["step"]
    return step
