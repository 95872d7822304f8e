"""FP8 against numbers from the format's definition, and a quantised layer against two implementations of the graph."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from tests.calibration.blocks import block_inputs, block_model, observed, quantized, worst_cosine
from tests.export.graphs import float_value, make_model, weight

from bridgeport.calibration.placement import PlaceTensorRT, plan_tensorrt
from bridgeport.calibration.placement.fp8 import round_to_fp8
from bridgeport.calibration.records import TensorRange

RANDOM = np.random.default_rng(3)


def run_without_fusion(model: ir.Model, feeds: dict[str, Any]) -> Any:
    """ONNX Runtime's result; its Q/DQ fusions take FP8 for INT8 and are switched off."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def linear(matrix: Any) -> ir.Model:
    """`y = x @ matrix`."""
    x = float_value("x", "batch", matrix.shape[0])
    node = ir.node("MatMul", [x, weight("w", matrix)], name="linear")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", matrix.shape[1]])
    return make_model([x], [y], [node])


@pytest.mark.parametrize(
    ("number", "rounded"),
    [
        # 4 exponent bits with bias 7, 3 of mantissa: steps of 1/8 between 1 and 2, of 32 between 256 and 448.
        (1.0625, 1.0),  # a tie goes to the even mantissa
        (1.1875, 1.25),
        (432.0, 448.0),
        (431.0, 416.0),
        (449.0, 448.0),
        (1e6, 448.0),
        (-1e6, -448.0),
        (2.0**-9, 2.0**-9),  # the smallest subnormal
        (2.0**-10, 0.0),
        (0.0, 0.0),
    ],
)
def test_round_to_fp8(number: float, rounded: float) -> None:
    assert float(round_to_fp8(np.array([number], np.float32)).astype(np.float32)[0]) == rounded


@pytest.mark.parametrize("per_channel", [True, False])
def test_fp8_layer_equals_an_emulation(per_channel: bool) -> None:
    """The placed graph in the reference evaluator and in ONNX Runtime, against the layer written with ml_dtypes."""
    matrix = RANDOM.normal(size=(32, 24)).astype(np.float32) * np.geomspace(0.01, 10, 24, dtype=np.float32)
    x = RANDOM.normal(size=(5, 32)).astype(np.float32) * 3
    top = float(np.abs(x).max())
    model = linear(matrix)
    ranges = {"x": TensorRange(-top, top / 2)}
    PlaceTensorRT(ranges, precision="fp8", per_channel=per_channel).run(model)
    expected = emulated(x, top, matrix, per_channel=per_channel)
    evaluated: Any = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    # All three multiply the same rounded numbers in FP32; only the order of 32 additions differs.
    for result in (evaluated[0], run_without_fusion(model, {"x": x})):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))
    # The tolerance is no tie: a scale that is one FP16 step larger gives other numbers.
    other = emulated(x, top * 1.01, matrix, per_channel=per_channel)
    assert np.abs(other - expected).max() > 1e-3 * np.abs(expected).max()


def emulated(x: Any, top: float, matrix: Any, *, per_channel: bool) -> Any:
    """The layer in FP8, written apart from the package."""

    def scale(amax: Any) -> Any:
        wanted = np.asarray(amax, np.float32) / np.float32(448)
        half = wanted.astype(np.float16)
        return np.where(half < wanted, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)

    def fake(array: Any, step: Any) -> Any:
        codes = np.clip(array / step, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return codes.astype(np.float32) * step

    amax = np.abs(matrix).max(axis=0) if per_channel else np.abs(matrix).max()
    return fake(x, scale(top)) @ fake(matrix, scale(amax))


def test_fp8_weight_is_stored_as_one_byte() -> None:
    matrix = RANDOM.normal(size=(32, 24)).astype(np.float32)
    model = linear(matrix)
    PlaceTensorRT({"x": TensorRange(-3, 3)}, precision="fp8").run(model)
    stored = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT8E4M3FN]
    sizes = sorted(value.const_value.nbytes for value in stored if value.const_value is not None)
    assert sizes == [1, 24, 32 * 24]  # the zero points of activation and weight, the weight
    assert "w" not in model.graph.initializers


def test_fp8_block_stays_close() -> None:
    model = block_model()
    feeds = block_inputs(model)
    before = run_without_fusion(model, feeds)
    after = run_without_fusion(quantized(model, "fp8"), feeds)
    # Measured 0.9961. Half of 3 bits of mantissa is 6 % of a number at worst, 2 % on average.
    assert worst_cosine(before, after) > 0.99
    clipped = block_model()
    ranges = observed(clipped, plan_tensorrt(clipped, precision="fp8").watch, feeds)
    ranges["gelu.out"] = TensorRange(-0.1, 0.1)
    PlaceTensorRT(ranges, precision="fp8").run(clipped)
    assert worst_cosine(before, run_without_fusion(clipped, feeds)) < 0.95
