"""Mixed precision on a CPU: what a layer saves is timed on that layer alone, in float and in INT8."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from numpy.typing import NDArray

from ..errors import InputError
from ..export.graph import save_graph
from ..export.passes import apply_passes
from ..export.passes.gemm import MatMulFromGemm
from .auto import Candidates, Feed, FloatLayers, Judge, LayerTimes, Run, choose_float_layers
from .cpu import CpuChoice, open_engine, race
from .linears import Linear, find_linears
from .placement.cpu import CPU_SCHEMES, quantize_cpu
from .placement.cpu_attention import find_self_attentions
from .placement.cpu_parts import find_linear_parts, linear_part
from .placement.patterns import infer_types
from .records import TensorRange
from .search import Keep
from .sensitivity import Activations, LayerDamage
from .tapped import open_values

if TYPE_CHECKING:
    from .job import StageJob

_ROUNDS = 9
# A layer that is slower in INT8 by less than this part of its time in float was measured as equal: it counts as saving
# the other part, next to nothing.
_NOISE, _NOTHING = 0.1, 0.01


def choose_cpu_layers(
    job: StageJob,
    graph: Path,
    ranges: Mapping[str, TensorRange],
    choice: CpuChoice,
    choose: Callable[[frozenset[str], Sequence[str] | None], CpuChoice],
    keep: frozenset[str],
    aside: Sequence[Feed],
    work: Path,
) -> tuple[FloatLayers, CpuChoice]:
    """Which products of the smoothed FP32 `graph` stay in float beside those in `keep`, and the scheme of the others.

    The search is in the scheme of `choice`, what `choose` gave without further layers in float; with them another one
    may be exact enough and faster, so the scheme is chosen again.
    """
    open_graph, _ = open_engine(choice.engine, None)
    judge = Judge(job, open_graph(job.graph), aside)
    scheme = CPU_SCHEMES[choice.scheme]

    def quantized(source: Path, out: Path, kept: Keep, name: str = choice.scheme) -> Path:
        quantize_cpu(source, out, ranges, kept, name, weight_bits=choice.weight_bits)
        return out

    def mixed(kept: Keep, name: str = choice.scheme) -> Run:
        return open_graph(quantized(graph, work / "mixed.onnx", keep | kept, name))

    def times(damages: Sequence[LayerDamage]) -> LayerTimes:
        clock = LayerClock(graph, aside[0], fused=scheme.attention != "float")
        saved = clock.saved_ms(damages, open_graph, lambda layer, out: quantized(layer, out, frozenset()), work)
        how = f"measured here by {choice.engine} {choice.version}: each layer alone in FP32 and in {choice.scheme}"
        return LayerTimes(saved, choice.chosen.milliseconds, how)

    activations: Activations = "static" if scheme.needs_ranges else "dynamic"
    candidates = Candidates(graph, _candidates(graph, keep), ranges, activations, choice.weight_bits)
    layers = choose_float_layers(
        job, candidates, times, lambda kept: judge.few(mixed(kept)), lambda kept: judge.many(mixed(kept))
    )
    kept = frozenset(layers.keep)
    final = choose(keep | kept, None)
    if final.scheme != choice.scheme and not judge.many(mixed(kept, final.scheme)) >= job.min_cosine:
        final = choose(keep | kept, [choice.scheme])
    return layers, final


def _candidates(graph: Path, keep: frozenset[str]) -> list[Linear]:
    """The products that placement rewrites: a Gemm becomes the MatMul of its name before."""
    model = ir.load(graph)
    linears = [one for one in find_linears(model) if one.node not in keep]
    apply_passes(model, (MatMulFromGemm(),), stage="layers")
    rewritten = {part.node.name for part in find_linear_parts(model)}
    return [one for one in linears if not rewritten.isdisjoint((one.node, f"{one.node}/MatMul"))]


class LayerClock:
    """Times layers of the FP32 `graph` alone, on what they read when the graph runs on `feed`.

    `fused`: whether a self-attention is one layer with the products that it starts with. Layers of the same shapes are
    timed once.
    """

    def __init__(self, graph: Path, feed: Feed, *, fused: bool) -> None:
        self._file, self._feed = graph, feed
        self._model = ir.load(graph)
        infer_types(self._model)
        self._nodes = {node.name: node for node in self._model.graph}
        attentions = find_self_attentions(self._model) if fused else ()
        self._ends = {name: one.end[1].outputs[0] for one in attentions for name in one.names}

    def saved_ms(
        self,
        damages: Sequence[LayerDamage],
        open_graph: Callable[[Path], Run],
        quantize: Callable[[Path, Path], Path],
        work: Path,
    ) -> dict[str, float]:
        """Node -> milliseconds that INT8 saves. `quantize`: writes a layer's graph in INT8; `work`: for files."""
        alike: dict[tuple[object, ...], LayerDamage] = {}
        for one in damages:
            alike.setdefault(self._shapes(one), one)
        values = self._read({self._input(one).name or "" for one in alike.values()})
        saved = {shapes: self._time(one, values, open_graph, quantize, work) for shapes, one in alike.items()}
        return {node: saved[self._shapes(one)] / len(one.nodes) for one in damages for node in one.nodes}

    def _input(self, layer: LayerDamage) -> ir.Value:
        value = self._nodes[layer.nodes[0]].inputs[0]
        if value is None:
            raise InputError(f"{layer.nodes[0]} reads nothing; check the graph with onnx.checker")
        return value

    def _outputs(self, layer: LayerDamage) -> list[ir.Value]:
        """What the layer computes: products with their bias, or all of an attention."""
        found = []
        for name in layer.nodes:
            part = linear_part(self._nodes[name])
            found.append(self._ends.get(name) or (self._nodes[name].outputs[0] if part is None else part.output))
        return list(dict.fromkeys(found))

    def _shapes(self, layer: LayerDamage) -> tuple[object, ...]:
        weights = [self._nodes[name].inputs[1] for name in layer.nodes]
        operators = [node.op_type for value in self._outputs(layer) if (node := value.producer()) is not None]
        return (str(self._input(layer).shape), *operators, *(str(one and one.shape) for one in weights))

    def _read(self, names: set[str]) -> dict[str, NDArray[Any]]:
        computed = sorted(names - self._feed.keys())
        return {**self._feed, **(open_values(self._file, computed)(self._feed) if computed else {})}

    def _time(
        self,
        layer: LayerDamage,
        values: Feed,
        open_graph: Callable[[Path], Run],
        quantize: Callable[[Path, Path], Path],
        work: Path,
    ) -> float:
        model = self._extracted(layer)
        feed = {value.name or "": values[value.name or ""] for value in model.graph.inputs}
        save_graph(model, work / "layer.onnx")
        runs = {
            "float": open_graph(work / "layer.onnx"),
            "int8": open_graph(quantize(work / "layer.onnx", work / "layer-int8.onnx")),
        }
        rounds = race(runs, feed, _ROUNDS)
        before = median(rounds["float"])
        saved = median(one - other for one, other in zip(rounds["float"], rounds["int8"], strict=True))
        return saved if saved < -_NOISE * before else max(saved, _NOTHING * before)

    def _extracted(self, layer: LayerDamage) -> ir.Model:
        given = [self._input(layer)]
        given += [value for value in self._model.graph.inputs if value is not given[0]]
        graph = ir.convenience.extract(self._model.graph, given, self._outputs(layer))
        for value in tuple(graph.inputs):
            if not value.uses():
                graph.inputs.remove(value)
        return ir.Model(graph, ir_version=self._model.ir_version)
