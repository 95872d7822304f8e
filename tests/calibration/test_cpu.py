"""INT8 for the CPU: the numbers of every scheme, what is fused, and how one of them is chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tests.calibration.blocks import block_inputs, block_model, observed, worst_cosine
from tests.export.graphs import float_value, make_model, run, save, weight

from bridgeport import speed_hint
from bridgeport.calibration import cpu
from bridgeport.calibration.placement.cpu import CPU_SCHEMES, PlaceCpu, place, quantize_cpu, watch_cpu
from bridgeport.calibration.records import TensorRange
from bridgeport.errors import ExportError, InputError
from bridgeport.speed_hint import SpeedHint, check_speed_hint

PRODUCTS = ("query", "key", "value", "projection", "fc1", "fc2")
# Rounding to 8 bits turns a token of this block by less than 0.02 (measured: 0.9997 to 0.99995 over the schemes, 0.9994
# with 7-bit weights); half the range on one activation gives 0.95.
MIN_COSINE = 0.999


def ranges_of(model: ir.Model) -> dict[str, TensorRange]:
    return observed(model, watch_cpu(model), block_inputs(model))


def placed(scheme: str, model: ir.Model | None = None, **options: Any) -> tuple[ir.Model, PlaceCpu]:
    source = model or block_model()
    options = {"ranges": ranges_of(source), **options}
    placement = PlaceCpu(scheme, **options)
    return place(source, placement, stage="test"), placement


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def optimized(model: ir.Model, feeds: Mapping[str, Any]) -> Any:
    """As the run time has it, everything fused."""
    return run(model, feeds, optimize=True)[0]


@pytest.mark.parametrize("bits", [8, 7])
@pytest.mark.parametrize("scheme", CPU_SCHEMES)
def test_every_scheme_keeps_the_numbers(scheme: str, bits: int) -> None:
    feeds = block_inputs(block_model(), batch=3, seed=11)
    expected = run(block_model(), feeds)[0]
    ranges = observed(block_model(), watch_cpu(block_model()), feeds)
    quantized, placement = placed(scheme, weight_bits=bits, ranges=ranges)
    assert set(PRODUCTS) <= set(placement.placement.quantized)
    assert worst_cosine(expected, optimized(quantized, feeds)) >= MIN_COSINE


@pytest.mark.parametrize("scheme", [name for name, one in CPU_SCHEMES.items() if one.needs_ranges])
def test_a_range_that_is_too_small_shows(scheme: str) -> None:
    model = block_model()
    feeds = block_inputs(block_model(), batch=3, seed=11)
    ranges = observed(model, watch_cpu(model), feeds)
    name = next(node for node in model.graph if node.name == "fc2").inputs[0].name  # type: ignore[union-attr]
    assert name is not None
    ranges[name] = TensorRange(ranges[name].low / 2, ranges[name].high / 2)
    assert worst_cosine(run(block_model(), feeds)[0], optimized(placed(scheme, ranges=ranges)[0], feeds)) < MIN_COSINE


def linear_model(matrix: Any, bias: Any, op_type: str = "MatMul") -> ir.Model:
    """`y = x @ matrix + bias`, as MatMul and Add or as one Gemm with a transposed weight."""
    x = float_value("x", "batch", matrix.shape[0])
    if op_type == "Gemm":
        stored = weight("w", np.ascontiguousarray(matrix.T))
        nodes = [ir.node("Gemm", [x, stored, weight("b", bias)], {"transB": 1}, name="one")]
    else:
        product = ir.node("MatMul", [x, weight("w", matrix)], name="one")
        product.outputs[0].name = "product"
        nodes = [product, ir.node("Add", [weight("b", bias), product.outputs[0]], name="bias")]
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", matrix.shape[1]])
    return make_model([x], [y], nodes)


@pytest.mark.parametrize("op_type", ["MatMul", "Gemm"])
@pytest.mark.parametrize("scheme", ["dynamic-s8", "static-u8s8", "qdq-u8s8"])
def test_golden_product(scheme: str, op_type: str) -> None:
    """By hand. Range -1 to 1.55: scale 0.01, zero point 100, so that x is exact. Columns' scales: 1 and 0.5 over 127;
    the entry 0.3 of the second becomes 76 steps (76.2), which is 0.2992126."""
    matrix = np.array([[1.0, 0.5], [-1.0, 0.3]], np.float32)
    x = np.array([[1.55, -1.0], [0.25, 0.5]], np.float32)
    model = linear_model(matrix, np.array([10.0, -10.0], np.float32), op_type)
    expected = [
        [10 + 1.55 + 1.0, -10 + 1.55 * 0.5 - 76 * 0.5 / 127],
        [10 + 0.25 - 0.5, -10 + 0.25 * 0.5 + 0.5 * 76 * 0.5 / 127],
    ]
    quantized, _ = placed(scheme, model, ranges={"x": TensorRange(-1.0, 1.55)})
    # FP32 sums of numbers up to 10; one step of the weight would be 0.004.
    np.testing.assert_allclose(optimized(quantized, {"x": x}), expected, atol=1e-5)


@pytest.mark.parametrize(("scheme", "scales"), [("dynamic-s8", 4), ("dynamic-s8-attention", 4), ("static-u8s8", 4)])
def test_readers_of_one_value_share_its_scale(scheme: str, scales: int) -> None:
    found = operators(placed(scheme)[0])
    assert found["DynamicQuantizeLinear"] + found["QuantizeLinear"] == scales


@pytest.mark.parametrize("scheme", ["dynamic-s8-attention", "static-u8s8-attention"])
def test_self_attention_becomes_one_operator(scheme: str) -> None:
    found = operators(placed(scheme)[0])
    assert found["QAttention"] == 1
    assert not {"Softmax", "Transpose", "MatMul", "Reshape"} & set(found)


def test_masked_attention_is_left_alone() -> None:
    quantized, placement = placed("dynamic-s8-attention", block_model(mask=True))
    assert placement.placement.fused == ()
    assert operators(quantized)["QAttention"] == 0
    assert set(placement.placement.quantized) == set(PRODUCTS)


def test_cross_attention_is_left_alone() -> None:
    """Queries and keys of two tensors: one fused operator would project one of them twice."""
    model = block_model()
    nodes = {node.name: node for node in model.graph}
    nodes["query"].replace_input_with(0, model.graph.inputs[0])
    feeds = block_inputs(model)
    expected = run(model, feeds)[0]
    quantized, placement = placed("dynamic-s8-attention", model)
    assert placement.placement.fused == ()
    assert worst_cosine(expected, optimized(quantized, feeds)) >= MIN_COSINE


def test_qdq_is_of_the_standard_alone() -> None:
    quantized, placement = placed("qdq-u8s8-attention")
    assert set(quantized.graph.opset_imports) == {""}
    assert {node.domain for node in quantized.graph} == {""}
    assert placement.placement.fused == ("softmax",)


@pytest.mark.parametrize("scheme", CPU_SCHEMES)
def test_kept_products_stay_in_float(scheme: str) -> None:
    quantized, placement = placed(scheme, keep=frozenset({"key", "fc2"}))
    left = {node.name for node in quantized.graph if node.op_type == "MatMul" and node.inputs[1].is_initializer()}  # type: ignore[union-attr]
    assert left == {"key", "fc2"}
    assert set(placement.placement.left or {}) == {"key", "fc2"}
    assert not {"key", "fc2"} & set(placement.placement.quantized)


@pytest.mark.parametrize("scheme", CPU_SCHEMES)
def test_values_keep_their_names(scheme: str) -> None:
    """Comparison finds the same value in both graphs by its name."""
    quantized, _ = placed(scheme)
    names = {value.name for node in quantized.graph for value in node.outputs}
    assert {"projection.add.out", "fc1.add.out", "fc2.add.out", "joined.out", "residual1.out", "y"} <= names


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (7, 63)])
@pytest.mark.parametrize("scheme", ["dynamic-s8-attention", "qdq-u8s8"])
def test_weights_use_their_bits_and_no_more(scheme: str, bits: int, largest: int) -> None:
    quantized, _ = placed(scheme, weight_bits=bits)
    stored = [one for name, one in quantized.graph.initializers.items() if name.endswith(".int8")]
    assert len(stored) in (4, 6)
    assert {int(np.abs(one.const_value.numpy().astype(int)).max()) for one in stored if one.const_value} == {largest}


def test_a_column_of_zeros_stays_zero() -> None:
    model = linear_model(np.array([[0.0, 1.0], [0.0, 1.0]], np.float32), np.zeros(2, np.float32))
    y = optimized(placed("dynamic-s8", model, ranges={})[0], {"x": np.ones((1, 2), np.float32)})
    assert y[0, 0] == 0.0


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("int9", {}, "scheme 'int9' is unknown; known for cpu are dynamic-s8, "),
        ("static-u8s8", {"ranges": {}}, "norm1.out has no range"),
        ("qdq-u8s8", {"ranges": {"norm1.out": TensorRange(0.0, float("nan"))}}, "finite numbers are accepted"),
        ("dynamic-s8", {"weight_bits": 4}, "weights of 4 bits; accepted are 8, and 7"),
    ],
)
def test_bad_options(scheme: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        placed(scheme, **options)


@pytest.mark.parametrize("scheme", CPU_SCHEMES)
def test_quantising_twice_is_refused(scheme: str) -> None:
    quantized, _ = placed(scheme)
    with pytest.raises(ExportError, match="the graph is quantised already"):
        place(quantized, PlaceCpu("dynamic-s8"), stage="encoder")


@pytest.mark.parametrize(("stage", "self_attentions", "others"), [("encoder", 2, 0), ("connector", 3, 2)])
def test_the_attention_of_an_exported_stage_is_fused(
    stage: str, self_attentions: int, others: int, blip2_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    """Cross-attention stays: its map is an output of the connector's variant."""
    graph = blip2_bundle("llama-gqa-tied") / stage / "model.onnx"
    placement = quantize_cpu(graph, tmp_path / "model.onnx", scheme="dynamic-s8-attention")
    found = operators(ir.load(tmp_path / "model.onnx"))
    assert (len(placement.fused), found["QAttention"]) == (self_attentions, self_attentions)
    assert (found["Softmax"], found["MatMul"]) == (others, 2 * others)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return save(block_model(), tmp_path)


def choose(graph: Path, **options: Any) -> cpu.CpuChoice:
    model = ir.load(graph)
    inputs = [block_inputs(model)]  # those that `ranges_of` saw
    given = {"rounds": 1, "threads": 1, **options}
    return cpu.choose_scheme(graph, inputs, ranges_of(block_model()), graph.parent, **given)


def plant_times(patch: pytest.MonkeyPatch, **milliseconds: float) -> None:
    """FP32 takes 10 ms, other schemes 9 or what is said."""
    given = {name.replace("_", "-"): value for name, value in milliseconds.items()}

    def race(runs: Mapping[str, Any], feed: Any, rounds: int) -> dict[str, list[float]]:
        return {name: [10.0 if name == cpu.FLOAT32 else given.get(name, 9.0)] * rounds for name in runs}

    patch.setattr(cpu, "race", race)


def test_the_fastest_scheme_is_chosen(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_times(monkeypatch, static_u8s8=2.5, dynamic_s8=4.0)
    choice = choose(graph)
    assert (choice.scheme, choice.passed, choice.chosen.ratio, choice.fp32_milliseconds) == (
        "static-u8s8",
        True,
        4.0,
        10.0,
    )
    assert {one.scheme for one in choice.candidates} == {
        name for name, scheme in CPU_SCHEMES.items() if "onnxruntime" in scheme.engines
    }


def test_a_scheme_that_is_not_exact_enough_is_not_chosen(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_times(monkeypatch, static_u8s8=2.5)
    monkeypatch.setattr(
        cpu, "_cosines", lambda runs, _: {name: 0.9 if name == "static-u8s8" else 0.99 for name in runs}
    )
    assert choose(graph).scheme != "static-u8s8"
    hopeless = choose(graph, min_cosine=0.999)
    assert not hopeless.passed
    assert hopeless.chosen.min_token_cosine == 0.99


def test_of_two_that_are_as_fast_the_more_exact_is_chosen(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_times(monkeypatch, static_u8s8=2.5, dynamic_s8=2.52)
    high = {"static-u8s8": 0.991, "dynamic-s8": 0.995, "qdq-u8s8": 0.999}
    monkeypatch.setattr(cpu, "_cosines", lambda runs, _: {name: high.get(name, 0.99) for name in runs})
    assert choose(graph).scheme == "dynamic-s8"


def test_nan_is_never_exact(graph: Path) -> None:
    def broken(feed: Any) -> dict[str, Any]:
        return {"y": np.full((1, 4), np.nan, np.float32)}

    def whole(feed: Any) -> dict[str, Any]:
        return {"y": np.ones((1, 4), np.float32)}

    assert cpu._cosines({cpu.FLOAT32: whole, "broken": broken}, [{}])["broken"] <= 0.0


def test_times_and_cosines_are_measured(graph: Path) -> None:
    choice = choose(graph, schemes=["dynamic-s8", "qdq-u8s8"])
    assert all(one.milliseconds > 0 and one.ratio > 0 for one in choice.candidates)
    assert all(MIN_COSINE <= one.min_token_cosine < 1 for one in choice.candidates)
    hint = choice.hint()
    assert hint.scheme in ("dynamic-s8", "qdq-u8s8")
    assert set(hint.milliseconds) == {"fp32", "dynamic-s8", "qdq-u8s8"}
    assert SpeedHint.model_validate(hint.model_dump(mode="json")) == hint


@pytest.mark.parametrize(("instruction_set", "bits"), [("avx512-vnni", 8), ("avx2", 7), ("dotprod", 8), ("none", 7)])
def test_seven_bits_where_sums_saturate(
    graph: Path, monkeypatch: pytest.MonkeyPatch, instruction_set: str, bits: int
) -> None:
    monkeypatch.setattr(cpu, "best_instruction_set", lambda: instruction_set)
    choice = choose(graph, schemes=["dynamic-s8"])
    assert (choice.weight_bits, choice.hint().instruction_set) == (bits, instruction_set)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schemes": ["int9"]}, "scheme 'int9' is unknown"),
        ({"schemes": ["qdq-u8s8-attention"]}, "no INT8 scheme for engine 'onnxruntime' among qdq-u8s8-attention"),
        ({"engine": "torch"}, "no INT8 scheme for engine 'torch'"),
    ],
)
def test_nothing_to_choose_from(graph: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose(graph, **options)
    with pytest.raises(InputError, match="no inputs to choose"):
        cpu.choose_scheme(graph, [], None, graph.parent)


HINT = SpeedHint(
    instruction_set="avx512-vnni", processor="Example 9000", scheme="dynamic-s8", version="1.31.0", ratio=3.04
)


def test_a_hint_for_another_processor_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_hint, "instruction_sets", lambda: ("avx2",))
    warning = check_speed_hint(HINT)
    assert warning is not None
    assert "made for avx512-vnni (Example 9000), where dynamic-s8 ran 3.0 x as fast as FP32" in warning
    assert "has avx2" in warning


@pytest.mark.parametrize("has", [("avx512-vnni", "avx2"), ("amx-int8", "avx512-vnni", "avx2")])
def test_a_hint_for_a_processor_that_can_says_nothing(monkeypatch: pytest.MonkeyPatch, has: tuple[str, ...]) -> None:
    monkeypatch.setattr(speed_hint, "instruction_sets", lambda: has)
    assert check_speed_hint(HINT) is None
    assert check_speed_hint(HINT.model_copy(update={"instruction_set": "none"})) is None


def test_instruction_sets_are_read_from_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_hint, "_fields", lambda: {"flags": "fpu avx2 avx512bw avx512_vnni", "model name": "X"})
    assert speed_hint.instruction_sets.__wrapped__() == ("avx512-vnni", "avx512", "avx2")
    monkeypatch.setattr(speed_hint, "_fields", lambda: {"Features": "fp asimd asimddp"})
    assert speed_hint.instruction_sets.__wrapped__() == ("dotprod",)
    monkeypatch.setattr(speed_hint, "_fields", dict)
    assert speed_hint.instruction_sets.__wrapped__() == ()
