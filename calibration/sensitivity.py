"""How much of a stage's accuracy each layer costs when it alone is quantised.

One sweep over the graph: it is cut before every layer, and behind each cut goes one copy of the activations for every
layer that was already quantised (a lane), next to those of the untouched graph. A layer is tried where the untouched
activations reach it, and from there on its lane runs through what is left; nothing before a layer runs twice. With L
layers of equal cost that is L / 2 runs of the graph for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..runtime.parity.metrics import token_cosines
from .linears import Linear, find_linears, layer_of
from .placement.base import FP8, INT8, QuantFormat
from .records import TensorRange
from .segments import Changed, Segment, SegmentedGraph, Values

Feed = Mapping[str, NDArray[Any]]
Activations = Literal["static", "dynamic", "float"]


@dataclass(frozen=True)
class LayerDamage:
    """What quantising one layer alone does to the stage's output, over all samples.

    A layer is all products in a row that read the same activation (query, key and value; gate and up). `index`: its
    place in the order of the graph. `nodes`: names of the products. `layer`: module path of the first. `cosine_loss`:
    1 - cosine of the worst token. `relative_mse`: mean squared error over the mean square of the output.
    """

    index: int
    nodes: tuple[str, ...]
    layer: str
    cosine_loss: float
    relative_mse: float


@dataclass
class _Group:
    """Linears that share an activation; `losses`, `errors`: one entry per sample."""

    linears: tuple[Linear, ...]
    layer: str
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


@dataclass
class _Sample:
    """Activations of one sample: `values` of the untouched graph, `lanes` what differs once a group is quantised."""

    values: Values
    lanes: dict[int, Values] = field(default_factory=dict)


def rank_layers(
    graph: Path,
    inputs: Iterable[Feed],
    ranges: Mapping[str, TensorRange],
    *,
    linears: Sequence[Linear] | None = None,
    activations: Activations = "static",
    bits: int = 8,
    fp8: bool = False,
    output: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LayerDamage, ...]:
    """The layers of `graph`, the most harmful first; ties in the order of the graph.

    Weights are rounded symmetrically to `bits` bits per output channel. `activations`: "static", INT8 with the
    symmetric range that `ranges` has for the value (a value without range, or with a range of 0, stays as it is);
    "dynamic", unsigned INT8 over the extremes of each call; "float", weights alone. `fp8`: weights and static
    activations in FP8 (E4M3) instead. `inputs`: a few feeds (input name
    -> array); all are in memory at once. `linears`: those to try, None for all. `output`: the value to judge, None for
    the graph's first output. `progress`: called with segments done and all.

    Raises CalibrationError when there is no sample, no layer or no such output, or when a sample does not run.
    """
    if not 2 <= bits <= 8:
        raise CalibrationError(f"weights of {bits} bits asked for; accepted are 2 to 8")
    groups, cuts = _groups(graph, linears)
    cut_graph = SegmentedGraph(graph, cuts, [_output(graph, output)])
    samples = [_sample(graph, cut_graph.inputs, feed) for feed in inputs]
    if not samples or not groups:
        raise CalibrationError(f"{graph}: {len(samples)} samples and {len(groups)} layers to rank; needs one of each")
    starts = {cut: index for index, cut in enumerate(cuts)}
    rounding = FP8 if fp8 else bits
    at = 0
    for number, segment in enumerate(cut_graph.segments):
        index = starts.get(at)
        change = None if index is None else _quantised(cut_graph, segment, groups[index], ranges, activations, rounding)
        _advance(cut_graph, segment, samples, index, change)
        at += len(segment.nodes)
        if progress is not None:
            progress(number + 1, len(cut_graph.segments))
    _judge(groups, samples, _output(graph, output))
    damages = [_damage(index, group) for index, group in enumerate(groups)]
    return tuple(sorted(damages, key=lambda one: (-one.cosine_loss, -one.relative_mse, one.index)))


def affordable_samples(observed: int, layers: int) -> int:
    """How many samples `rank_layers` can take (one at least) in twice the time of observing `observed` samples."""
    return max(1, 4 * observed // max(layers, 1))


def _sample(graph: Path, names: Sequence[str], feed: Feed) -> _Sample:
    missing = [name for name in names if name not in feed]
    if missing:
        raise CalibrationError(f"a sample has no input {missing[0]!r}, which {graph} needs")
    return _Sample({name: np.asarray(feed[name]) for name in names})


def _groups(graph: Path, linears: Sequence[Linear] | None) -> tuple[list[_Group], list[int]]:
    """Layers in the order of the graph, and for each the index of its first node."""
    model = ir.load(graph)
    places = {node.name: (index, layer_of(node)) for index, node in enumerate(model.graph)}
    chosen = find_linears(model) if linears is None else linears
    missing = [one.node for one in chosen if one.node not in places]
    if missing:
        raise CalibrationError(f"{graph} has no node {missing[0]!r}; give linears that find_linears found in it")
    groups: list[list[Linear]] = []
    for one in sorted(chosen, key=lambda linear: places[linear.node][0]):
        if groups and groups[-1][0].input == one.input:
            groups[-1].append(one)
        else:
            groups.append([one])
    found = [_Group(tuple(members), places[members[0].node][1]) for members in groups]
    return found, [places[group.linears[0].node][0] for group in found]


def _output(graph: Path, output: str | None) -> str:
    names = [str(value.name) for value in ir.load(graph).graph.outputs]
    if output is not None and output not in names:
        raise CalibrationError(f"{graph} has no output {output!r}; its outputs are {', '.join(names)}")
    return output or names[0]


def _advance(
    graph: SegmentedGraph, segment: Segment, samples: Sequence[_Sample], index: int | None, change: Changed | None
) -> None:
    """All activations through `segment`; where it holds the group `index`, that group's lanes begin."""
    session = graph.session(segment, samples[0].values)
    quantised = None if change is None else graph.session(segment, samples[0].values, change)
    for sample in samples:
        for lane in sample.lanes.values():
            if not lane.keys().isdisjoint(segment.inputs):
                lane.update(graph.run(session, segment, sample.values | lane))
        if index is not None and quantised is not None:
            sample.lanes[index] = graph.run(quantised, segment, sample.values)
        sample.values.update(graph.run(session, segment, sample.values))
        for values in (sample.values, *sample.lanes.values()):
            for name in segment.dead:
                values.pop(name, None)


def _quantised(
    graph: SegmentedGraph,
    segment: Segment,
    group: _Group,
    ranges: Mapping[str, TensorRange],
    activations: Activations,
    bits: int | QuantFormat,
) -> Changed:
    """`segment` with the products of `group` quantised."""
    import onnx

    value = group.linears[0].input
    before, own = _quantised_activation(value, ranges.get(value), activations, FP8 if bits is FP8 else INT8)
    by_name = {node.name: node for node in segment.nodes}
    nodes = []
    for linear in group.linears:
        node = onnx.NodeProto()
        node.CopyFrom(by_name[linear.node])
        weight = graph.initializers[linear.weight]
        array = onnx.numpy_helper.to_array(weight, str(graph.file.parent)).astype(np.float32)
        rounded = round_weight(array, _output_axis(node, array.ndim), bits)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
        own.append(onnx.numpy_helper.from_array(rounded.astype(dtype), f"{linear.weight}/rounded"))
        node.input[1] = f"{linear.weight}/rounded"
        if before:
            node.input[0] = f"{value}/rounded"
        nodes.append(node)
    return Changed(tuple(nodes), tuple(own), tuple(before))


def _quantised_activation(
    value: str, chosen: TensorRange | None, activations: Activations, stored_as: QuantFormat
) -> tuple[list[Any], list[Any]]:
    """Nodes that make "<value>/rounded" of `value`, and their constants; none where it stays as it is."""
    import onnx

    make = onnx.helper.make_node
    scale, zero, stored = f"{value}/scale", f"{value}/zero", f"{value}/stored"
    back = make("DequantizeLinear", [stored, scale, zero], [f"{value}/rounded"])
    if activations == "dynamic":
        return [make("DynamicQuantizeLinear", [value], [stored, scale, zero]), back], []
    if activations == "float" or chosen is None or chosen.absmax == 0.0:
        return [], []
    constants = [
        onnx.numpy_helper.from_array(np.array(chosen.absmax / stored_as.largest, np.float32), scale),
        onnx.numpy_helper.from_array(stored_as.zero(), zero),
    ]
    return [make("QuantizeLinear", [value, scale, zero], [stored]), back], constants


def _output_axis(node: Any, rank: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if any(one.name == "transB" and one.i for one in node.attribute) else 1
    return rank - 1


def round_weight(weight: NDArray[np.float32], axis: int, bits: int | QuantFormat) -> NDArray[np.float32]:
    """`weight` rounded symmetrically to `bits` bits or to a format, one scale for each index of `axis` (the output
    channels).
    """
    levels = 2 ** (bits - 1) - 1 if isinstance(bits, int) else bits.largest
    others = tuple(index for index in range(weight.ndim) if index != axis)
    scale = np.abs(weight).max(axis=others, keepdims=True) / np.float32(levels)
    scale = np.where(scale == 0, np.float32(1), scale)
    if isinstance(bits, int):
        return np.asarray(np.clip(np.rint(weight / scale), -levels - 1, levels) * scale, dtype=np.float32)
    return np.asarray(bits.quantize(weight, scale).astype(np.float32) * scale, dtype=np.float32)


def _judge(groups: Sequence[_Group], samples: Sequence[_Sample], output: str) -> None:
    for sample in samples:
        reference = np.asarray(sample.values[output], dtype=np.float64)
        power = float(np.mean(reference**2))
        for index, group in enumerate(groups):
            actual = np.asarray(sample.lanes[index].get(output, reference), dtype=np.float64)
            finite = bool(np.isfinite(actual).all())
            group.losses.append(1.0 - float(token_cosines(reference, actual).min()) if finite else 2.0)
            error = float(np.mean((actual - reference) ** 2)) if finite else np.inf
            group.errors.append(error / power if power else float(error > 0))


def _damage(index: int, group: _Group) -> LayerDamage:
    nodes = tuple(linear.node for linear in group.linears)
    return LayerDamage(index, nodes, group.layer, max(group.losses), float(np.mean(group.errors)))
