"""Q/DQ for TensorRT: where it stands, what stays in float, and the numbers of the quantised graph."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass
from tests.calibration.blocks import (
    block_inputs,
    block_model,
    node_of,
    observed,
    quantized,
    worst_cosine,
)
from tests.export.graphs import float_value, make_model, run, weight

from bridgeport.calibration.placement import PlaceTensorRT, plan_tensorrt
from bridgeport.calibration.placement.base import INT8, scales_from
from bridgeport.calibration.records import TensorRange
from bridgeport.calibration.rules import check_rules
from bridgeport.errors import ExportError, InputError
from bridgeport.export.graph import save_graph
from bridgeport.export.lint import lint_graphs
from bridgeport.export.passes import apply_passes
from bridgeport.export.passes.weights import constant

# Of the small model, counted by hand. Encoder, 4 layers: 1 + 4 * 6 weights. Values with a pair: pixel_values, in each
# layer the inputs of query/key/value (one), projection, fc1 and fc2, the two skips, and 5 of the attention.
# Connector, 4 layers, cross-attention in every other one: 4 * 6 + 2 * 4 weights and the projection to the language
# model. Values: image_embeds; in each layer the input of query/key/value, of the projection, of fc1 and of fc2, of
# which the skips are the first and third (post-norm: a skip is a norm's output, which is the next product's input);
# in every other layer two more for cross-attention; the last output; 5 for each of 6 attentions, whose results are 6
# pairs besides those on the projections' inputs.
COUNTS = {"encoder": (1 + 4 * (4 + 2 + 5), 1 + 4 * 6), "connector": (1 + 4 * 4 + 2 * 2 + 1 + 6 * 5, 4 * 6 + 2 * 4 + 1)}


def q_and_dq(model: ir.Model) -> tuple[int, int]:
    count = Counter(node.op_type for node in model.graph)
    return count["QuantizeLinear"], count["DequantizeLinear"]


def source_of(model: ir.Model, node: str, index: int) -> str:
    """Type of the node that gives an input of `node`, "" for none."""
    value = node_of(model, node).inputs[index]
    producer = None if value is None else value.producer()
    return "" if producer is None else producer.op_type


def load_in_memory(path: Path) -> ir.Model:
    model = ir.load(path)
    ir.external_data.load_to_model(model)
    return model


def run_file(path: Path, feeds: Mapping[str, Any]) -> Any:
    """ONNX Runtime's result of the file, everything optimised."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))[0]


@dataclasses.dataclass(frozen=True)
class PlacedStage:
    """A stage of the small model and its INT8 graph on disk."""

    source: Path
    path: Path
    feeds: dict[str, Any]
    ranges: dict[str, TensorRange]
    placement: Any


@pytest.fixture(scope="module")
def placed_stages(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PlacedStage]:
    stages = {}
    for stage in COUNTS:
        source = small_bundle / stage / "model.onnx"
        model = load_in_memory(source)
        feeds = block_inputs(model)
        ranges = observed(model, plan_tensorrt(model, precision="int8").watch, feeds)
        place = PlaceTensorRT(ranges, precision="int8")
        model = ir.load(source)
        apply_passes(model, [place], stage=stage)
        path = tmp_path_factory.mktemp(stage) / "model.onnx"
        save_graph(model, path)
        stages[stage] = PlacedStage(source, path, feeds, ranges, place.placement)
    return stages


@pytest.mark.parametrize("stage", COUNTS)
def test_small_model(placed_stages: dict[str, PlacedStage], stage: str) -> None:
    placed = placed_stages[stage]
    pairs, weights = COUNTS[stage]
    assert q_and_dq(ir.load(placed.path)) == (pairs, pairs + weights)
    assert (placed.placement.pairs, placed.placement.weights, placed.placement.left) == (pairs, weights, {})
    assert check_rules(placed.path, precision="int8") == ()
    onnx.checker.check_model(placed.path, full_check=True)
    before = placed.source.with_suffix(".onnx.data").stat().st_size
    after = placed.path.with_suffix(".onnx.data").stat().st_size
    assert after < 0.3 * before  # weights are a byte; position embeddings, biases and norms stay as they were
    result, expected = run_file(placed.path, placed.feeds), run_file(placed.source, placed.feeds)
    # Measured 0.992 (encoder) and 0.997 (connector) on these random inputs, ranges from the same.
    assert worst_cosine(expected, result) > 0.98


def test_a_clipped_range_is_seen(placed_stages: dict[str, PlacedStage]) -> None:
    """The tolerance above catches one wrong range of 45."""
    placed = placed_stages["encoder"]
    model = load_in_memory(placed.source)
    wrong = placed.ranges | {"layer_norm_3": TensorRange(-0.2, 0.2)}
    PlaceTensorRT(wrong, precision="int8").run(model)
    assert worst_cosine(run_file(placed.source, placed.feeds), run(model, placed.feeds)[0]) < 0.98


@pytest.mark.slow
def test_linted(placed_stages: dict[str, PlacedStage], tmp_path: Path) -> None:
    graphs = {stage: placed.path for stage, placed in placed_stages.items()}
    assert lint_graphs(graphs, tmp_path) == dict.fromkeys(graphs, "clean")


def test_every_edge_of_a_block() -> None:
    """Every input that is quantised, and no other."""
    model = quantized(block_model(mask=True))
    found = {
        (node.name, index)
        for node in model.graph
        for index, value in enumerate(node.inputs)
        if value is not None and (producer := value.producer()) is not None and producer.op_type == "DequantizeLinear"
    }
    products = {(name, index) for name in ("query", "key", "value", "projection", "fc1", "fc2") for index in (0, 1)}
    attention = {(name, index) for name in ("scores", "mix") for index in (0, 1)} | {("join", 0)}
    assert found == products | attention | {("residual1", 1), ("residual2", 1)}
    # norm1's output has one pair for its three readers.
    pairs = {node_of(model, name).inputs[0] for name in ("query", "key", "value")}
    assert len(pairs) == 1


def test_block_numbers() -> None:
    model = block_model(mask=True)
    feeds = block_inputs(model)
    before = run(model, feeds)[0]
    after = run(quantized(model), feeds)[0]
    assert worst_cosine(before, after) > 0.995  # measured 0.9994


def test_keep() -> None:
    keep = frozenset({"fc1", "residual2", "mix"})
    model = quantized(block_model(), keep=keep)
    for name in ("fc1", "residual2", "scores", "mix"):
        assert {source_of(model, name, 0), source_of(model, name, 1)} & {"DequantizeLinear"} == set()
    assert node_of(model, "fc1").inputs[1] is model.graph.initializers["fc1.weight"]
    assert source_of(model, "fc2", 0) == source_of(model, "fc2", 1) == "DequantizeLinear"
    assert check_rules(model, precision="int8") == ()


def test_keep_names_nodes_of_the_graph() -> None:
    with pytest.raises(InputError, match=r"\['fc9'\] are not in the graph"):
        plan_tensorrt(block_model(), precision="int8", keep=frozenset({"fc9"}))


def test_plan_names_what_it_quantises_and_watches() -> None:
    plan = plan_tensorrt(block_model(), precision="int8")
    products = ("query", "key", "value", "projection", "fc1", "fc2")
    assert plan.nodes == (*products, "residual1", "residual2", "scores")
    for name in plan.nodes:  # each can be kept
        assert name not in plan_tensorrt(block_model(), precision="int8", keep=frozenset({name})).nodes
    assert len(plan.watch) == len(set(plan.watch)) == 10


@pytest.mark.parametrize(
    ("sizes", "precision", "reason"),
    [
        ({"head_size": 88}, "int8", "head size 88 has no fused INT8 kernel"),
        ({"tokens": 577}, "int8", "sequence length 577 is beyond the fused INT8 kernels' 512"),
        ({"head_size": 128}, "fp8", "head size 128 has no fused FP8 kernel"),
    ],
)
def test_attention_without_a_kernel_stays_float(sizes: dict[str, Any], precision: str, reason: str) -> None:
    model = block_model(**sizes)
    plan = plan_tensorrt(model, precision=precision)
    place = PlaceTensorRT(observed(model, plan.watch, block_inputs(model, batch=1)), precision=precision)
    place.run(model)
    assert reason in place.placement.left["scores"]
    for name in ("scores", "mix"):
        assert "DequantizeLinear" not in {source_of(model, name, 0), source_of(model, name, 1)}
    assert source_of(model, "join", 0) == "MatMul"
    assert source_of(model, "projection", 0) == "DequantizeLinear"
    assert check_rules(model, precision=precision) == ()


@pytest.mark.parametrize(("tokens", "head_size"), [(512, 16), (8, 32), (8, 64)])
def test_attention_with_a_kernel(tokens: int, head_size: int) -> None:
    plan = plan_tensorrt(block_model(tokens=tokens, head_size=head_size), precision="int8")
    assert "scores" in plan.nodes


def test_attention_of_unknown_length_stays_float() -> None:
    model = block_model()
    x, y = model.graph.inputs[0], model.graph.outputs[0]
    x.shape, y.shape = ir.Shape(["batch", "tokens", 32]), ir.Shape(["batch", "tokens", 32])
    assert "are not fixed in the graph" in plan_tensorrt(model, precision="int8").left["scores"]


def test_fp8_attention_scales_the_queries() -> None:
    """The scale stands before the pair of Q, so that DequantizeLinear feeds the matmul; the numbers stay."""
    model = block_model(mask=True)
    feeds = block_inputs(model)
    before = run(model, feeds)[0]
    quantized(model, "fp8")
    assert [node.name for node in model.graph if node.op_type == "Mul"] == ["scale/queries"]
    assert source_of(model, "scores", 0) == source_of(model, "scores", 1) == "DequantizeLinear"
    assert source_of(model, "mask", 0) == "MatMul"
    # The scale of the probabilities is fixed.
    assert model.graph.initializers["softmax.out.scale"].const_value.numpy() == pytest.approx(1 / 448, rel=1e-3)  # type: ignore[union-attr]
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            value, dequantize = node.inputs[0], next(iter(node.outputs[0].uses()))[0]
            assert value is not None
            ir.convenience.replace_all_uses_with(dequantize.outputs[0], value)
    for weight_of in ("query", "key", "value", "projection", "fc1", "fc2"):
        original = block_model(mask=True).graph.initializers[f"{weight_of}.weight"].const_value
        assert original is not None
        node_of(model, weight_of).replace_input_with(1, constant(model, f"{weight_of}.original", original.numpy()))
    RemoveUnusedNodesPass()(model)
    np.testing.assert_allclose(run(model, feeds)[0], before, rtol=1e-5, atol=1e-5)


def test_weights_follow_the_output_channels() -> None:
    """Gemm with and without transB, MatMul and Conv: the scale of channel c covers the largest weight of channel c."""
    random = np.random.default_rng(5)
    image = float_value("image", "batch", 3, 4, 4)
    kernel = random.normal(size=(6, 3, 4, 4)).astype(np.float32)
    conv = ir.node("Conv", [image, weight("kernel", kernel)], name="conv")
    flat = ir.node("Flatten", [conv.outputs[0]], name="flat")
    first, second, third = (random.normal(size=(6, 6)).astype(np.float32) for _ in range(3))
    nodes = [conv, flat]
    for name, op_type, matrix, attributes in (
        ("straight", "Gemm", first, {}),
        ("turned", "Gemm", second, {"transB": 1}),
        ("product", "MatMul", third, {}),
    ):
        nodes.append(ir.node(op_type, [nodes[-1].outputs[0], weight(name, matrix)], attributes, name=name))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", 6])
    model = make_model([image], [y], nodes)
    quantized(model)
    for name, array, axis in (
        ("conv", kernel, 0),
        ("straight", first, 1),
        ("turned", second, 0),
        ("product", third, 1),
    ):
        dq = node_of(model, name).inputs[1].producer()  # type: ignore[union-attr]
        assert dq is not None
        assert dq.attributes.get_int("axis") == axis
        codes, scale = (value.const_value.numpy() for value in dq.inputs[:2])  # type: ignore[union-attr]
        assert codes.dtype == np.int8
        others = tuple(one for one in range(array.ndim) if one != axis)
        np.testing.assert_allclose(scale, np.abs(array).max(axis=others) / 127, rtol=1e-3)
        assert np.abs(codes.astype(np.int32)).max(axis=others).min() >= 126
    assert check_rules(model, precision="int8") == ()


def test_scales_are_exact_in_fp16_and_never_too_small() -> None:
    absmax = np.concatenate([np.geomspace(1e-8, 1e4, 200), [0.0]]).astype(np.float32)
    scales = scales_from(absmax, INT8)
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))
    assert (scales > 0).all()
    assert (scales[:-1] * 127 >= absmax[:-1] * (1 - 1e-6)).all()


def test_weights_are_not_held_in_memory() -> None:
    model = quantized(block_model())
    stored = [value for value in model.graph.initializers.values() if value.name and value.name.endswith(".int8.axis1")]
    assert len(stored) == 6
    assert all(isinstance(value.const_value, ir.LazyTensor) for value in stored)
    assert not [name for name in model.graph.initializers if name.endswith(".weight")]


def test_tied_weight_is_stored_once() -> None:
    x = float_value("x", "batch", 8)
    shared = weight("shared", np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32))
    first = ir.node("MatMul", [x, shared], name="first")
    second = ir.node("MatMul", [first.outputs[0], shared], name="second")
    y = second.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", 8])
    model = make_model([x], [y], [first, second])
    quantized(model)
    assert q_and_dq(model) == (2, 3)


def test_dead_tensor_stays_float() -> None:
    model = block_model()
    ranges = observed(model, plan_tensorrt(model, precision="int8").watch, block_inputs(model))
    place = PlaceTensorRT(ranges | {"gelu.out": TensorRange(0, 0)}, precision="int8")
    place.run(model)
    assert place.placement.left == {"fc2": "its input gelu.out was 0 everywhere in calibration"}
    assert source_of(model, "fc2", 0) == "Gelu"
    assert check_rules(model, precision="int8") == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gelu.out": TensorRange(float("nan"), 1)}, "gelu.out reached nan to 1 in calibration"),
        ({"gelu.out": TensorRange(-1, float("inf"))}, "gelu.out reached -1 to inf"),
        ({"gelu.out": TensorRange(-1, 3e7)}, "has the magnitude 3e\\+07"),
        (None, "10 values have no range, the first"),
    ],
)
def test_bad_ranges(change: dict[str, TensorRange] | None, message: str) -> None:
    model = block_model()
    ranges = observed(model, plan_tensorrt(model, precision="int8").watch, block_inputs(model))
    with pytest.raises(InputError, match=message):
        PlaceTensorRT({} if change is None else ranges | change, precision="int8").run(model)


def test_bad_options() -> None:
    with pytest.raises(InputError, match=r"precision int4 has no Q/DQ placement; \['fp8', 'int8'\]"):
        PlaceTensorRT({}, precision="int4")
    with pytest.raises(InputError, match="one scale for a whole INT8 weight"):
        PlaceTensorRT({}, precision="int8", per_channel=False)


def test_quantising_twice_is_refused() -> None:
    model = quantized(block_model())
    with pytest.raises(ExportError, match="place-tensorrt cannot run: the graph is quantised already"):
        apply_passes(model, [PlaceTensorRT({}, precision="int8")], stage="encoder")


def test_without_residuals_and_attention() -> None:
    model = quantized(block_model(), residuals=False, attention=False)
    assert source_of(model, "residual1", 1) == ""
    assert q_and_dq(model) == (4, 10)
