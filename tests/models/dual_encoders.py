"""Stages of a checkpoint with two encoders beside transformers' model of the same files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bridgeport.models import load_checkpoint

# FP32 through at most three small layers; values are of order 1 (vectors of length 1 behind the projections).
# Observed: at most 2e-6 of the RMS.
OF_RMS = 2e-5
# A weight that is off by 5 % in one column moves its stage's output by at least this much of the RMS.
CAUGHT = 1e-3

Values = dict[str, Tensor]


def our_values(path: Path, pixels: Tensor, ids: Tensor, mask: Tensor) -> Values:
    """Each stage's output."""
    model = load_checkpoint(path)
    with torch.no_grad():
        image_embeds = model.encoder(pixels)
        return {
            "encoder": image_embeds,
            "connector": model.connector(image_embeds),
            "text_encoder": model.load_stage("text_encoder")(ids, mask),
        }


def reference_values(path: Path, pixels: Tensor, ids: Tensor, mask: Tensor) -> Values:
    """The same of transformers' model."""
    make: Any = getattr(transformers, load_checkpoint(path).architecture)
    model = make.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        outputs = model(pixel_values=pixels, input_ids=ids, attention_mask=mask)
    return {
        "encoder": outputs.vision_model_output.last_hidden_state,
        "connector": outputs.image_embeds,
        "text_encoder": outputs.text_embeds,
    }


def pictures(path: Path, batch: int) -> Tensor:
    """Random `pixel_values` of the size that the checkpoint takes."""
    shape = load_checkpoint(path).contracts["encoder"].inputs[0].shape[1:]
    return torch.randn(batch, *(int(size) for size in shape), generator=torch.Generator().manual_seed(batch))


def tokens(rows: Sequence[Sequence[int]], pad: int, width: int) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`, right-padded to `width`."""
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference over the RMS of `theirs`; infinite for another shape."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.square().mean().sqrt())


def check_shapes(path: Path, values: Values) -> None:
    """The contracts say the shapes that came, batch axis aside."""
    contracts = load_checkpoint(path).contracts
    for stage, value in values.items():
        assert contracts[stage].outputs[0].shape[1:] == tuple(value.shape[1:]), stage
