"""Connector against connector: the same tokens of an encoder in, the same width of a language model out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...models.blip2 import Blip2Connector
from ...models.contract import StageContract
from ...models.language import batch_axis, float_spec
from ...models.projector import LinearProjector, MlpProjector
from ...models.qformer import QFormerConfig
from ...models.simplified_qformer import SimplifiedQFormer
from ...models.stages import Layout, Stage
from .measure import ROUNDS, RandomWeights, Timing, time_graph, time_module
from .modules import run_on_meta

# Tokens and width of an encoder: ViT-g/14 at 224 pixels (BLIP-2), ViT-L/14 at 336 (LLaVA-1.5), class tokens included.
ENCODERS = ((257, 1408), (577, 1024))
OUTPUT_WIDTH = 4096  # of a language model of 7 B parameters
QUERIES = 32
_QFORMER_WIDTH = 768


def _linear(width: int, out: int) -> nn.Module:
    return LinearProjector(width, out)


def _mlp(width: int, out: int) -> nn.Module:
    return MlpProjector((width, out, out))


def _one_layer(width: int, out: int) -> nn.Module:
    former = SimplifiedQFormer(_QFORMER_WIDTH, 12, QUERIES, encoder_width=width)
    return nn.Sequential(former, LinearProjector(_QFORMER_WIDTH, out))


def _qformer(width: int, out: int) -> nn.Module:
    config = QFormerConfig.from_transformers({"encoder_hidden_size": width}, QUERIES)
    return Blip2Connector(config, out)


# Name in the table -> the module for an encoder's width and a language model's.
CONNECTORS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear (LLaVA 1.0)": _linear,
    "MLP, 2 layers (LLaVA 1.5)": _mlp,
    "Q-Former, 1 layer": _one_layer,
    "Q-Former, 12 layers (BLIP-2)": _qformer,
}


@dataclass(frozen=True)
class ConnectorReport:
    """One connector on one encoder's output, one picture: `tokens` of `width` in, `features` of `output_width` out."""

    connector: str
    tokens: int
    width: int
    features: int
    output_width: int
    parameters: int
    flops: int
    latency: dict[str, Timing] = field(default_factory=dict)

    @property
    def compression(self) -> float:
        """Tokens in for one out."""
        return self.tokens / self.features


def compare_connectors(
    *,
    encoders: Sequence[tuple[int, int]] | None = None,
    output_width: int = OUTPUT_WIDTH,
    rounds: int = ROUNDS,
    graphs: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[ConnectorReport]:
    """Every connector of `CONNECTORS` on each of `encoders`, `(tokens, width)` (`ENCODERS`), with random weights.

    `rounds`: 0 to time nothing. `graphs`: a directory where they are exported to, to be timed in ONNX Runtime too.
    """
    say = progress or (lambda _: None)
    for tokens, width in encoders or ENCODERS:
        for name, make in CONNECTORS.items():
            say(f"{name} on {tokens} x {width}")
            stage = Stage(lambda make=make, width=width: make(width, output_width), lambda key: key)  # type: ignore[misc]
            yield _compare(name, stage, (tokens, width), output_width, rounds, graphs)


def _compare(
    name: str, stage: Stage, encoder: tuple[int, int], output_width: int, rounds: int, graphs: Path | None
) -> ConnectorReport:
    tokens, width = encoder
    module = stage.on_meta().requires_grad_(False)
    probe = _contract(tokens, width, tokens, output_width)
    one = run_on_meta(module, probe, {"image_embeds": (1, tokens, width)})
    features = one.shape[1]
    contract = _contract(tokens, width, features, output_width)
    return ConnectorReport(
        connector=name,
        tokens=tokens,
        width=width,
        features=features,
        output_width=one.shape[2],
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        flops=one.flops,
        latency=_time(stage, contract, rounds, graphs) if rounds else {},
    )


def _time(stage: Stage, contract: StageContract, rounds: int, graphs: Path | None) -> dict[str, Timing]:
    layout = Layout(kind="connector", stages={"connector": stage}, contracts={"connector": contract})
    module = layout.load("connector", RandomWeights(stage))
    _, *shape = contract.inputs[0].shape
    embeds = np.random.default_rng(0).standard_normal((1, *(int(dim) for dim in shape)), dtype=np.float32)
    found = {"PyTorch": time_module(module, [embeds], rounds)}
    if graphs is not None:
        from ..graph import trace_and_save

        file = graphs / "connector.onnx"
        trace_and_save(module, contract, file)
        _check_same(file, contract, module, embeds)
        found["ONNX Runtime"] = time_graph(file, contract, {"image_embeds": embeds}, rounds)
        for written in (file, file.with_name(f"{file.name}.data")):
            written.unlink(missing_ok=True)
    return found


def _check_same(file: Path, contract: StageContract, module: Any, embeds: Any) -> None:
    """What is timed must be right: the export's own check, here against the module in memory."""
    from ..checks import Reference, check_equality

    with torch.inference_mode():
        output = module(torch.from_numpy(embeds)).numpy()
    check_equality(file, [Reference({"image_embeds": embeds}, output)], stage="connector", output="image_features")


def _contract(tokens: int, width: int, features: int, output_width: int) -> StageContract:
    return StageContract(
        name="connector",
        inputs=(float_spec("image_embeds", "batch", tokens, width),),
        outputs=(float_spec("image_features", "batch", features, output_width),),
        axes=(batch_axis(),),
    )
