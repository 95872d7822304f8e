"""The activation functions that checkpoints name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    # CLIP's (Radford et al. 2021, arXiv 2103.00020): a sigmoid in place of the Gaussian's integral.
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def find_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function called `name`; InputError for one that is not in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise InputError(f"activation {name!r} is unknown; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
