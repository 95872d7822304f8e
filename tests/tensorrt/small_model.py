"""A model of one product, and the calls of the adapter that build and run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bridgeport.runtime.tensorrt.api import Api, BuildProgress

PROFILE = {"x": ((1, 3), (2, 3), (4, 3))}
LATER_PROFILE = {"x": ((5, 3), (6, 3), (8, 3))}
WEIGHT = np.array([[1, 2], [3, 4], [5, 6]], np.float32)


def write_small_model(folder: Path) -> Path:
    """y = x @ WEIGHT, [batch, 3] -> [batch, 2]."""
    return write_model(folder / "model.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"], "product")])


def write_model(path: Path, nodes: list[Any], rows: str = "batch", columns: int = 2) -> Path:
    graph = helper.make_graph(
        nodes,
        "stage",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def build(
    api: Api, model: Path, *flags: str, profiles: Any = (PROFILE,), progress: BuildProgress | None = None
) -> bytes:
    builder = api.create_builder()
    network = api.create_strongly_typed_network(builder)
    config = api.create_config(builder)
    api.parse_onnx(api.create_parser(network, config), model)
    api.set_tf32(config, False)
    api.set_flags(config, flags)
    for profile in profiles:
        api.add_profile(builder, config, profile)
    return api.build_serialized(builder, network, config, progress)


def run(api: Api, engine: Any, x: np.ndarray[Any, Any], profile: int = 0, strategy: str = "STATIC") -> Any:
    context = api.create_context(engine, strategy)
    api.set_profile(context, profile, 7)
    api.set_input_shape(context, "x", x.shape)
    assert api.infer_shapes(context) == []
    y = np.zeros(api.tensor_shape(context, "y"), np.float32)
    memory = np.zeros(api.device_memory_size(engine), np.uint8)
    if strategy == "USER_MANAGED":
        api.set_device_memory(context, memory.ctypes.data, memory.nbytes)
    api.set_address(context, "x", x.ctypes.data)
    api.set_address(context, "y", y.ctypes.data)
    api.execute(context, 7)
    return y
