"""Inside a stage that diverged: the first ONNX node whose output departs from PyTorch's corresponding module.

The stage's graph runs once more on PyTorch's input with every value that PyTorch has too (`probes`) as an
output, the reference runs with hooks, and the two are compared in the graph's topological order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import EngineError
from ..onnxruntime.loader import first_line, import_onnxruntime, onnxruntime_errors
from .metrics import Difference, Gate, compare
from .probes import Probe, Side, region

if TYPE_CHECKING:
    from .report import Finding

# A departure is a jump, not a level: rounding grows slowly from node to node, a fault multiplies the error at
# once. So a fault is named where it enters even if it passes the stage's gate there and breaks it only
# further down.
JUMP = 10.0
# Errors (over the RMS of PyTorch's value) below which nothing counts as a jump; docs/parity.md has what was
# measured.
NOISE = Difference(max_abs=0, mean_abs=0, max_rel=2e-6, mean_rel=2e-7, min_token_cosine=1, scale=1)

NO_DEPARTURE = (
    "no node departs when every intermediate value is kept: no probed value shows the fault, or it shows only in a "
    "batch, in decoding with a cache, or under the engine's own graph optimizations"
)


@dataclass(frozen=True)
class Step:
    """One compared value: the ONNX node that computes it, PyTorch's module, and how far apart they are."""

    node: str
    op_type: str
    value: str
    module: str
    difference: Difference

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = {name: getattr(self, name) for name in ("node", "op_type", "value", "module")}
        return names | self.difference.to_dict()


@dataclass(frozen=True)
class DrillReport:
    """What was found inside `stage`.

    `departure`: the first value that departs (None when none does; `note` then says what that means);
    `before`: the last one that did not. `causes`: weights and attributes of the nodes between the two that
    are not PyTorch's. `compared`: how many values were.
    """

    stage: str
    departure: Step | None
    before: Step | None
    compared: int
    causes: tuple[str, ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "stage": self.stage,
            "departure": None if self.departure is None else self.departure.to_dict(),
            "before": None if self.before is None else self.before.to_dict(),
            "compared": self.compared,
            "causes": list(self.causes),
            "note": self.note,
        }


def drill_graph(
    stage: str,
    graph: Path,
    find_probes: Callable[[Any], list[Probe]],
    feeds: Mapping[str, NDArray[Any]],
    reference: Any,
    run_reference: Callable[[], Any],
    gate: Gate,
    findings: Sequence[Finding] = (),
) -> DrillReport:
    """Compare the graph at `graph`, fed `feeds`, with the torch module `reference` while `run_reference` runs
    it.

    `find_probes`: ONNX GraphProto -> probes whose modules are names in `reference`. `gate`: what counts as a
    departure whatever came before. `findings`: what reading the graph showed.
    """
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    probes = find_probes(model.graph)
    with _capture(reference, probes) as captured:
        run_reference()
    values = GraphRun(model, graph.parent, [probe.value for probe in probes])(feeds)
    steps = [
        (probe, _step(probe, expected, values[probe.value]))
        for probe in probes
        if (expected := _expected(captured, probe, values[probe.value])) is not None
    ]
    at = first_departure([step.difference for _, step in steps], gate)
    # A node that was found wrong by reading it is where the fault enters, however little of it shows there.
    known = {finding.node for finding in findings}
    suspects = (i for i, (probe, _) in enumerate(steps[:at]) if probe.node in known and probe.side == "output")
    at = next(suspects, at)
    texts = tuple(finding.text for finding in findings)
    if at is None:
        return DrillReport(stage, None, steps[-1][1] if steps else None, len(steps), texts, note=NO_DEPARTURE)
    from .causes import find_causes

    nodes = [model.graph.node[i] for i in region(model.graph, steps[at][0].value, (p.value for p, _ in steps[:at]))]
    causes = find_causes(model, graph.parent, nodes, reference, steps[at][0])
    unique = tuple(dict.fromkeys((*causes, *texts)))
    return DrillReport(stage, steps[at][1], steps[at - 1][1] if at else None, len(steps), unique)


def first_departure(differences: Sequence[Difference], gate: Gate) -> int | None:
    """Index of the first difference that breaks `gate` or jumps up against all before it; None when none
    does.
    """
    max_before, mean_before = NOISE.max_rel, NOISE.mean_rel
    for index, one in enumerate(differences):
        if gate.broken(one) or one.max_rel > JUMP * max_before or one.mean_rel > JUMP * mean_before:
            return index
        max_before, mean_before = max(max_before, one.max_rel), max(mean_before, one.mean_rel)
    return None


class GraphRun:
    """An ONNX ModelProto, its external data in `folder`, with `values` as outputs and nothing fused or rounded."""

    def __init__(self, model: Any, folder: Path, values: Sequence[str]) -> None:
        import onnx

        ort = import_onnxruntime()
        wanted = onnx.ModelProto()
        wanted.CopyFrom(model)
        del wanted.graph.output[:]
        wanted.graph.output.extend(onnx.ValueInfoProto(name=value) for value in dict.fromkeys(values))
        _compute_in_fp32(wanted.graph)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
        self._session = ort.InferenceSession(wanted.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The values by name; `feeds` may hold more than the graph takes."""
        names = [output.name for output in self._session.get_outputs()]
        inputs = {entry.name for entry in self._session.get_inputs()}
        try:
            outputs = self._session.run(names, {name: value for name, value in feeds.items() if name in inputs})
        except onnxruntime_errors() as error:
            raise EngineError(f"the graph does not run on PyTorch's input: {first_line(error)}") from error
        return dict(zip(names, outputs, strict=True))


def _compute_in_fp32(graph: Any) -> None:
    """Let MatMulNBits multiply with FP32 activations, so that only its weights are rounded."""
    import onnx

    for node in graph.node:
        if node.op_type == "MatMulNBits":
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", 1)])


Captured = dict[tuple[str, Side], list[NDArray[np.float32]]]


@contextmanager
def _capture(reference: Any, probes: Sequence[Probe]) -> Iterator[Captured]:
    """Collects outputs and first inputs of the probed modules, one entry per call, while the block runs."""
    from .reference import array

    captured: Captured = {}

    def keep(name: str, side: Side, value: Any) -> None:
        tensor = _first_tensor(value)
        if tensor is not None and tensor.is_floating_point():
            captured.setdefault((name, side), []).append(array(tensor))

    def watch(name: str) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            keep(name, "input", [*args, *kwargs.values()])
            keep(name, "output", output)

        return reference.get_submodule(name).register_forward_hook(hook, with_kwargs=True)

    handles = [watch(name) for name in dict.fromkeys(module for probe in probes for module in probe.modules)]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(value: Any) -> Any:
    """The first tensor of a module's arguments or result, or None."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for item in items if (found := _first_tensor(item)) is not None), None)


def _step(probe: Probe, expected: NDArray[np.float32], value: NDArray[Any]) -> Step:
    return Step(probe.node, probe.op_type, probe.value, probe.label, compare(expected, value.reshape(expected.shape)))


def _expected(captured: Captured, probe: Probe, value: NDArray[Any]) -> NDArray[np.float32] | None:
    """PyTorch's value for `probe`, shaped so that `value` reshapes to it; None when the two are not the same
    thing.

    A module that ran several times is taken at its first call of fitting shape. Where the graph computes the
    last position only (the LM head), so much of PyTorch's is taken.
    """
    calls = [captured.get((module, probe.side), []) for module in probe.modules]
    for parts in zip(*calls, strict=False):
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        if probe.third is not None:
            whole = np.split(whole, 3, axis=-1)[probe.third]
        for candidate in (whole, whole[:, -1:] if whole.ndim == 3 else whole):
            if candidate.shape[-1:] == value.shape[-1:] and candidate.size == value.size:
                return np.asarray(candidate)
    return None
