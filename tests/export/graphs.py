"""Small ONNX graphs for tests of passes and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from bridgeport.models.contract import Axis, StageContract, TensorSpec

WIDTH = 4


def float_value(name: str, *shape: int | str) -> ir.Value:
    """A float input of a graph."""
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def weight(name: str, array: Any) -> ir.Value:
    """An initializer."""
    tensor = ir.Tensor(np.asarray(array), name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def make_model(
    inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], nodes: Sequence[ir.Node], opset: int = 20, **domains: int
) -> ir.Model:
    """A model whose initializers are found from the nodes' inputs."""
    initializers = {
        value.name: value
        for node in nodes
        for value in node.inputs
        if value is not None and value.const_value is not None
    }
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=list(initializers.values()),
        opset_imports={"": opset, **{key.replace("_", "."): number for key, number in domains.items()}},
        name="test",
    )
    return ir.Model(graph, ir_version=10)


def norm_model(
    opset: int = 20, *, batch: int | str = "batch", scale: Any = None, op_type: str = "LayerNormalization"
) -> ir.Model:
    """`y = LayerNormalization(x)` over `[batch, WIDTH]`."""
    x = float_value("x", batch, WIDTH)
    gain = weight("gain", np.ones(WIDTH, np.float32) if scale is None else scale)
    shift = weight("shift", np.zeros(WIDTH, np.float32))
    node = ir.node(op_type, [x, gain, shift], {"axis": -1}, name="norm")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([batch, WIDTH])
    return make_model([x], [y], [node], opset)


def contract() -> StageContract:
    """The contract that `norm_model` keeps."""
    return StageContract(
        name="encoder",
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", WIDTH)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", WIDTH)),),
        axes=(Axis(name="batch", min=1, opt=1, max=8),),
    )


def save(model: ir.Model, directory: Path) -> Path:
    """Write the model and return its path."""
    path = directory / "model.onnx"
    ir.save(model, path)
    return path


def run(model: ir.Model, feeds: Mapping[str, Any], *, optimize: bool = False) -> list[Any]:
    """The model's outputs from ONNX Runtime, nothing fused unless asked for."""
    options = onnxruntime.SessionOptions()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, dict(feeds))
    return outputs
