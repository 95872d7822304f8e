"""Projectors against transformers' LLaVA projector and plain torch layers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.connectors import CAUGHT, assert_equal, connector_contract, copy_weights, export, prepare
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from bridgeport.errors import CheckpointError, InputError
from bridgeport.models.projector import LinearProjector, MlpProjector, llava_names, transformers_names


def llava_projector(width: int, layers: int, output_width: int, activation: str, bias: bool) -> nn.Module:
    """transformers' projector for `layers` vision layers side by side."""
    config: Any = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=width, num_attention_heads=1),
        text_config=LlamaConfig(hidden_size=output_width, num_attention_heads=1),
        vision_feature_layer=-2 if layers == 1 else list(range(-layers, 0)),
        projector_hidden_act=activation,
        multimodal_projector_bias=bias,
    )
    make: Any = LlavaMultiModalProjector
    projector: nn.Module = make(config)
    return projector


@pytest.mark.parametrize(
    ("width", "layers", "output_width", "activation", "bias"),
    [(24, 1, 32, "gelu", True), (17, 3, 40, "gelu", False), (32, 2, 10, "gelu_pytorch_tanh", True)],
)
@torch.no_grad()
def test_mlp_equals_transformers(width: int, layers: int, output_width: int, activation: str, bias: bool) -> None:
    theirs = prepare(llava_projector(width, layers, output_width, activation, bias), width)
    ours = MlpProjector([layers * width, output_width, output_width], activation=activation, bias=bias)
    copy_weights(theirs, ours, transformers_names(bias=bias))
    x = torch.randn(3, 7, layers * width, generator=torch.Generator().manual_seed(1))
    assert_equal(ours(x), theirs(x))
    wrong = MlpProjector([layers * width, output_width, output_width], activation="relu", bias=bias)
    wrong.load_state_dict(ours.state_dict())
    assert (wrong(x) - theirs(x)).abs().max() > CAUGHT


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@torch.no_grad()
def test_any_depth_equals_the_llava_projects_sequential(num_layers: int) -> None:
    widths = [20, 33, 12, 16][: num_layers + 1]
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for wide, narrow in pairwise(widths[1:]):
        layers += [nn.GELU(), nn.Linear(wide, narrow)]
    theirs, ours = prepare(nn.Sequential(*layers), num_layers), MlpProjector(widths)
    copy_weights(theirs, ours, llava_names(num_layers))
    x = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(2))
    assert_equal(ours(x), theirs(x))


@torch.no_grad()
def test_linear_is_one_layer() -> None:
    theirs, ours = prepare(nn.Linear(18, 23), 0), LinearProjector(18, 23)
    copy_weights(theirs, ours, {f"linear.{part}": part for part in ("weight", "bias")})
    x = torch.randn(2, 5, 18, generator=torch.Generator().manual_seed(3))
    assert_equal(ours(x), theirs(x))
    assert LinearProjector(18, 23, bias=False).linear.bias is None


@pytest.mark.parametrize(
    "projector",
    [pytest.param(LinearProjector(20, 24), marks=pytest.mark.slow), MlpProjector([20, 24, 24])],
    ids=["linear", "mlp"],
)
def test_exports_with_tiles_and_tokens_dynamic(projector: nn.Module, tmp_path: Path) -> None:
    contract = connector_contract({"image_embeds": ("tiles", "tokens", 20)}, ("tiles", "tokens", 24))
    operators = export(prepare(projector, 1), contract, tmp_path)
    assert operators["MatMul"] == sum(isinstance(module, nn.Linear) for module in projector.modules())


def test_refuses_what_it_cannot_build() -> None:
    with pytest.raises(CheckpointError, match=r"widths \[4\]: give an input and an output"):
        MlpProjector([4])
    with pytest.raises(InputError, match="activation 'mish' is unknown; known are gelu"):
        MlpProjector([4, 4, 4], activation="mish")
