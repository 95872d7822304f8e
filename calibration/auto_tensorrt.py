"""Mixed precision for TensorRT: what a layer saves follows from its work, since no such device is at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from .auto import Candidates, Feed, FloatLayers, Judge, LayerTimes, Run, choose_float_layers
from .linears import Linear, find_linears
from .placement import plan_tensorrt
from .placement.patterns import infer_types
from .placement.plan import weight_axis
from .records import TensorRange
from .search import Keep
from .sensitivity import LayerDamage
from .tapped import open_values

if TYPE_CHECKING:
    from .job import StageJob


@dataclass(frozen=True)
class Accelerator:
    """Peak rates of dense products: operations per second in FP16 and in 8 bits, and bytes of memory per second."""

    name: str
    half: float
    eight_bits: float
    memory: float


# NVIDIA's data sheet; the ratios, which the search goes by, are those of other GPUs since Turing. INT8 and FP8 alike.
L4 = Accelerator("NVIDIA L4", 121e12, 242e12, 300e9)


def choose_tensorrt_layers(
    job: StageJob,
    graph: Path,
    ranges: Mapping[str, TensorRange],
    keep: frozenset[str],
    aside: Sequence[Feed],
    build: Callable[[Keep], object],
) -> FloatLayers:
    """Which products of the smoothed FP32 `graph` stay in FP16 beside those in `keep`.

    `build`: writes the stage to `job.out` with these nodes in float.
    """
    judge = Judge(job, open_values(job.graph), aside)

    def mixed(kept: Keep) -> Run:
        build(kept)
        return open_values(job.out)

    planned = set(plan_tensorrt(ir.load(graph), precision=job.precision, keep=keep).nodes)
    linears = [one for one in find_linears(ir.load(graph)) if one.node in planned]

    def times(damages: Sequence[LayerDamage]) -> LayerTimes:
        saved, quantised = modelled_ms(graph, linears, aside[0])
        return LayerTimes(
            saved, quantised, f"modelled, not measured: operations and bytes of each product on an {L4.name}"
        )

    candidates = Candidates(graph, linears, ranges, fp8=job.precision == "fp8")
    return choose_float_layers(
        job, candidates, times, lambda kept: judge.few(mixed(kept)), lambda kept: judge.many(mixed(kept))
    )


def modelled_ms(
    graph: Path, linears: Sequence[Linear], feed: Feed, accelerator: Accelerator = L4
) -> tuple[dict[str, float], float]:
    """(node -> milliseconds that 8 bits save, milliseconds of all products in 8 bits) for one run on `feed`.

    A product takes the longer of its operations and its bytes: what it reads is half as large in 8 bits, what it writes
    is in FP16 in both.
    """
    model = ir.load(graph)
    infer_types(model)
    nodes = {node.name: node for node in model.graph}
    shapes = {
        one.node: (one.op_type, *(str(value and value.shape) for value in nodes[one.node].inputs)) for one in linears
    }
    alike = {shapes[one.node]: one for one in reversed(linears)}
    sizes = _sizes(graph, {name for one in alike.values() for name in (one.input, one.output)}, feed)
    times = {
        key: _product_ms(nodes[one.node], sizes[one.input], sizes[one.output], accelerator)
        for key, one in alike.items()
    }
    saved = {one.node: times[shapes[one.node]][0] - times[shapes[one.node]][1] for one in linears}
    return saved, sum(times[shapes[one.node]][1] for one in linears)


def _product_ms(node: ir.Node, read: int, written: int, accelerator: Accelerator) -> tuple[float, float]:
    """Milliseconds in FP16 and in 8 bits of a product that reads and writes so many numbers."""
    weight = node.inputs[1]
    shape = (1,) if weight is None or weight.shape is None else weight.shape.numpy()
    channels = shape[weight_axis(node) or 0]
    stored = math.prod(shape)
    operations = 2.0 * written * stored / channels

    def milliseconds(rate: float, width: int) -> float:
        return 1000.0 * max(operations / rate, (width * (read + stored) + 2 * written) / accelerator.memory)

    return milliseconds(accelerator.half, 2), milliseconds(accelerator.eight_bits, 1)


def _sizes(graph: Path, names: set[str], feed: Feed) -> dict[str, int]:
    """How many numbers each value has."""
    computed = sorted(names - feed.keys())
    arrays = open_values(graph, computed)(feed) if computed else {}
    return {name: array.size for name, array in (*feed.items(), *arrays.items())}
