"""FP16 graphs made for tests, and what is asked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from bridgeport.calibration.collect import collect
from bridgeport.calibration.fp16 import Float16Report, ToFloat16, watched_values
from bridgeport.calibration.observers import ObserverSettings
from bridgeport.calibration.records import Observations
from bridgeport.export.graph import save_graph
from bridgeport.export.passes import GraphPass, apply_passes

Feed = dict[str, NDArray[np.float32]]


def from_text(body: str, weights: Mapping[str, NDArray[np.generic]] | None = None) -> ir.Model:
    """A model of opset 20 from ONNX's textual syntax (`g (float[N,4] x) => (float[N,4] y) { ... }`)."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{body}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items())
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    for index, node in enumerate(inferred.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return ir.from_proto(inferred)


def converted(model: ir.Model, path: Path, *before: GraphPass, **options: object) -> Float16Report:
    """Apply `before` and `ToFloat16(**options)`, and write the graph."""
    half = ToFloat16(**options)  # type: ignore[arg-type]
    model, _ = apply_passes(model, [*before, half], stage="test")
    save_graph(model, path)
    return half.report


def check_types(path: Path) -> None:
    """ONNX's own checker: every node's inputs and outputs have types that its operator allows, and those stated."""
    onnx.checker.check_model(str(path), full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(str(path)), check_type=True, strict_mode=True)


def reference_run(path: Path, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The graph by ONNX's reference evaluator: numpy, every FP16 node in FP16."""
    model = onnx.load(str(path))
    with np.errstate(over="ignore", invalid="ignore"):
        results = ReferenceEvaluator(model).run(None, dict(feed))
    return dict(zip([value.name for value in model.graph.output], results, strict=True))


def observed(path: Path, feeds: list[Feed], also: Sequence[str] = ()) -> Observations:
    """What calibration sees of the graph at `path`: what `choose_float32_nodes` asks for, and `also`."""
    settings = ObserverSettings(observers=("minmax",))
    watch = tuple(dict.fromkeys((*watched_values(ir.load(path)), *also)))
    return collect(path, feeds, watch, key="test", samples=len(feeds), settings=settings)


def scale_weight(model: ir.Model, name: str, factor: float) -> None:
    """Multiply the initializer `name`, in place."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(factor), name=name)


def random_feeds(name: str, shape: tuple[int, ...], count: int = 2, seed: int = 0) -> list[Feed]:
    """Normal inputs."""
    generator = np.random.default_rng(seed)
    return [{name: generator.standard_normal(shape, dtype=np.float32)} for _ in range(count)]


def node_types(model: ir.Model, op_type: str) -> set[ir.DataType]:
    """Types of the float inputs of all nodes of that type."""
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    found = {
        value.dtype for node in model.graph if node.op_type == op_type for value in node.inputs if value is not None
    }
    return {dtype for dtype in found if dtype in floats}
