"""What a model's own modules say: parameters, shapes and FLOPs, on the meta device, where nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...models.contract import StageContract
from ...models.stages import Layout, Stage
from .measure import Shape, input_shapes

_TORCH_DTYPES = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}
# The stages that picture features go through; the rest is the language model, or the tower of texts.
VISUAL = ("encoder", "connector")


@dataclass(frozen=True)
class Pass:
    """One call of a stage: the shape of its output, and its FLOPs: two for each multiplication and addition of matrix
    products, convolutions and attention; norms, activations and softmax are not counted.
    """

    shape: Shape
    flops: int


def count_parameters(layout: Layout) -> dict[str, int]:
    """Learned numbers of the encoder, the connector and all other stages together ("language_model").

    A weight that several stages share, or that config ties to another, counts once, where it is met first.
    """
    counts = dict.fromkeys((*VISUAL, "language_model"), 0)
    # That a T5 has a head of its own, transformers keeps under this name.
    own_head = getattr(layout.text_config, "scale_decoder_outputs", None) is False
    tied = {} if own_head else layout.tied
    seen: set[str] = set()
    for name, stage in layout.stages.items():
        part = name if name in VISUAL else "language_model"
        for key, parameter in stage.on_meta().named_parameters():
            stored = stage.checkpoint_name(key)
            stored = tied.get(stored, stored)
            if stored not in seen:
                seen.add(stored)
                counts[part] += parameter.numel()
    return counts


def module_on_meta(stage: Stage) -> nn.Module:
    """The module, complete but for its weights."""
    module = stage.on_meta()
    with torch.device("meta"):
        stage.finish(module)
    return module.eval().requires_grad_(False)


def run_on_meta(module: nn.Module, contract: StageContract, shapes: Mapping[str, Shape]) -> Pass:
    """One call with inputs of `shapes`; a contract's input that has none is made of the axes' usual sizes.

    A custom connector computes: it lies on the CPU, where the tables that it makes for itself are (see `registry`).
    """
    with torch.device(next((parameter.device.type for parameter in module.parameters()), "meta")):
        inputs = [
            torch.zeros(shape, dtype=_TORCH_DTYPES[spec.dtype])
            for spec, shape in zip(contract.inputs, input_shapes(contract, shapes), strict=True)
        ]
        # No fused attention: every matrix product shows.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output: Any = module(*inputs)
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return Pass(tuple(first.shape), counter.get_total_flops())


def connector_name(layout: Layout) -> str:
    """The class of the connector's module."""
    return type(layout.stages["connector"].on_meta()).__name__
