"""A graph cut into segments that run one after the other, so that a change in one is followed without what is before.

Between two segments any number of values may be alive; each segment is an ONNX Runtime session of its own, made when
its turn comes and dropped after it, its weights read where they lie.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..runtime.onnxruntime.loader import first_line, import_onnxruntime, onnxruntime_errors

Values = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes (NodeProto) of a graph.

    `inputs`: values that they take from before; `outputs`: what they give that is used after them. `dead`: values that
    nothing after this segment uses.
    """

    nodes: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...]


class SegmentedGraph:
    """The graph in `file`, cut before each of the nodes at the indices `cuts`; `wanted` are the values to end with."""

    def __init__(self, file: Path, cuts: Sequence[int], wanted: Sequence[str]) -> None:
        import onnx

        self.file = file
        self.model = onnx.load(str(file), load_external_data=False)
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.inputs = tuple(value.name for value in self.model.graph.input if value.name not in self.initializers)
        nodes = list(self.model.graph.node)
        edges = sorted({0, len(nodes), *cuts})
        self.segments = tuple(self._segments([nodes[a:b] for a, b in itertools.pairwise(edges)], wanted))

    def _segments(self, parts: list[list[Any]], wanted: Sequence[str]) -> Iterator[Segment]:
        used = [_used(part) - self.initializers.keys() for part in parts]
        made = [{name for node in part for name in node.output if name} for part in parts]
        later: list[set[str]] = [set(wanted)]
        for names in reversed(used):
            later.append(later[-1] | names)
        later.reverse()  # later[i]: what segment i and those after it use
        alive = set(self.inputs)
        for index, part in enumerate(parts):
            after = later[index + 1]
            alive |= made[index]
            inputs = used[index] - made[index]
            yield Segment(tuple(part), _sorted(inputs), _sorted(made[index] & after), _sorted(alive - after))
            alive &= after

    def session(self, segment: Segment, values: Mapping[str, NDArray[Any]], changed: Changed | None = None) -> Any:
        """A session of `segment`, whose inputs have the types and ranks of `values`; `changed` replaces nodes."""
        import onnx

        changed = changed or Changed((), ())
        replaced = {node.output[0]: node for node in changed.nodes}
        nodes = [*changed.before, *(replaced.get(node.output[0], node) for node in segment.nodes)]
        own = {tensor.name: tensor for tensor in changed.initializers}
        needed = _used(nodes)
        initializers = [tensor for name, tensor in (self.initializers | own).items() if name in needed]
        inputs = [_typed(name, values[name]) for name in segment.inputs]
        outputs = [onnx.ValueInfoProto(name=name) for name in segment.outputs]
        graph = onnx.helper.make_graph(nodes, "segment", inputs, outputs, initializers)
        model = onnx.helper.make_model(graph, opset_imports=self.model.opset_import, functions=self.model.functions)
        model.ir_version = self.model.ir_version
        return self._load(model)

    def _load(self, model: Any) -> Any:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.file.parent.resolve())
        )
        try:
            return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except onnxruntime_errors() as error:
            raise CalibrationError(f"{self.file}: a part of it does not load: {first_line(error)}") from error

    def run(self, session: Any, segment: Segment, values: Mapping[str, NDArray[Any]]) -> Values:
        """The outputs of `segment` for `values`, which may hold more than it takes."""
        try:
            computed = session.run(list(segment.outputs), {name: values[name] for name in segment.inputs})
        except onnxruntime_errors() as error:
            raise CalibrationError(f"a sample does not run through {self.file}: {first_line(error)}") from error
        return dict(zip(segment.outputs, computed, strict=True))


@dataclass(frozen=True)
class Changed:
    """What a segment has instead of its own: `nodes` take the place of those with the same first output, `before` and
    `initializers` come in addition.
    """

    nodes: tuple[Any, ...]
    initializers: tuple[Any, ...]
    before: tuple[Any, ...] = ()


def _used(nodes: Sequence[Any]) -> set[str]:
    """Names that `nodes` read, those in their subgraphs included, but for what the subgraphs make themselves."""
    names: set[str] = set()
    for node in nodes:
        names |= {name for name in node.input if name}
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                own = {value.name for value in (*graph.input, *graph.initializer)}
                own |= {name for inner in graph.node for name in inner.output}
                outputs = {value.name for value in graph.output}
                names |= (_used(list(graph.node)) | outputs) - own
    return names


def _sorted(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names))


def _typed(name: str, value: NDArray[Any]) -> Any:
    import onnx

    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype)
    return onnx.helper.make_tensor_value_info(name, dtype, [None] * np.ndim(value))
