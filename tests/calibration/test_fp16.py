"""FP32 graphs to FP16: types, islands, Casts, and what would have broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from tests.calibration.float16 import (
    Feed,
    check_types,
    converted,
    from_text,
    node_types,
    observed,
    random_feeds,
    reference_run,
    scale_weight,
)

from bridgeport.calibration.compare import stage_difference
from bridgeport.calibration.fp16 import ToFloat16, choose_float32_nodes, watched_values
from bridgeport.calibration.outputs import find_nonfinite
from bridgeport.calibration.placement import PlaceTensorRT, plan_tensorrt
from bridgeport.calibration.records import Observations, TensorStats
from bridgeport.calibration.tapped import open_values
from bridgeport.errors import ExportError
from bridgeport.export.graph import save_graph
from bridgeport.export.passes import apply_passes

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
ENCODER, CONNECTOR = "encoder/model.onnx", "connector/model.onnx"
FEEDS = {
    ENCODER: random_feeds("pixel_values", (1, 3, 80, 80)),
    CONNECTOR: random_feeds("image_embeds", (1, 101, 96)),
}
# By hand. Encoder: 1 for the pictures; 9 norms, each input once and all outputs but the last; 4 softmax, in and out.
# Connector: 1 for the input, 1 for the output; 11 norms, of which the first reads a weight; 6 softmax, in and out.
CASTS = {ENCODER: 1 + 9 + 8 + 2 * 4, CONNECTOR: 2 + 10 + 11 + 2 * 6}


@pytest.fixture(scope="module", params=[ENCODER, CONNECTOR])
def stage(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def half(stage: str, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "model.onnx"
    report = converted(ir.load(small_bundle / stage), path)
    assert report.casts == CASTS[stage]
    assert not report.flushed
    return path


def test_types_are_those_of_every_operator(half: Path) -> None:
    check_types(half)
    model = ir.load(half)
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {SINGLE}
    assert node_types(model, "MatMul") == node_types(model, "Gelu") == {HALF}
    assert node_types(model, "LayerNormalization") == node_types(model, "Softmax") == {SINGLE}


def test_no_cast_is_there_twice(half: Path, stage: str) -> None:
    casts = [node for node in ir.load(half).graph if node.op_type == "Cast"]
    assert len(casts) == CASTS[stage]
    sources = [node.inputs[0] for node in casts]
    assert len(set(sources)) == len(sources)
    for source in sources:
        assert source is not None
        producer = source.producer()
        assert producer is None or producer.op_type != "Cast"


def test_half_the_size_and_nearly_the_same(half: Path, stage: str, small_bundle: Path) -> None:
    source = small_bundle / stage
    before, after = (path.with_name("model.onnx.data").stat().st_size for path in (source, half))
    assert 0.49 < after / before < 0.52
    # Measured 0.999998; a norm in FP16 (below) or a weight in the wrong place is far outside.
    difference = stage_difference(source, half, FEEDS[stage])
    assert difference.min_token_cosine > 0.9999
    assert find_nonfinite(half, FEEDS[stage][:1], intermediates=True) is None


def test_rounding_is_that_of_the_reference_evaluator(tmp_path: Path) -> None:
    # ONNX Runtime's CPU provider gives 1000 here: it computes FP16 nodes in FP32 and drops the Casts between them.
    body = """g (float[N,4] x) => (float[N,4] y) {
        a = Mul(x, up) b = Mul(a, down) c = Sigmoid(b) d = Add(c, x) y = Mul(d, x)
    }"""
    model = from_text(body, {"up": np.array(3000.0, np.float32), "down": np.array(1 / 3000, np.float32)})
    converted(model, tmp_path / "g.onnx")
    values = np.array([[0.1, -3.3, 20.0, 30.0], [1e-5, 700.0, -2.0, 5.5]], np.float32)
    emulated = open_values(tmp_path / "g.onnx")({"x": values})["y"]
    np.testing.assert_array_equal(emulated, reference_run(tmp_path / "g.onnx", {"x": values})["y"])


def test_an_overflow_shows_that_the_cpu_provider_hides(tmp_path: Path) -> None:
    model = from_text(
        "g (float[N,2] x) => (float[N,2] y) { a = Mul(x, up) y = Mul(a, down) }",
        {"up": np.array(1e4, np.float32), "down": np.array(1e-4, np.float32)},
    )
    path = tmp_path / "g.onnx"
    converted(model, path)
    feed = {"x": np.array([[1000.0, 1.0]], np.float32)}
    assert np.isinf(open_values(path)(feed)["y"][0, 0])
    found = find_nonfinite(path, [{"x": np.ones((1, 2), np.float32)}, feed])
    assert found is not None
    assert (found.sample, found.node, found.found, found.where) == (1, "Mul_0", "inf", (0, 0))


VALUE = "model.encoder.layers.1.self_attn.qkv"


@pytest.fixture(scope="module")
def overflowing(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder with the values of one attention times 1e5, and the projection after it times 1e-5."""
    path = tmp_path_factory.mktemp("overflow") / "model.onnx"
    model = ir.load(small_bundle / ENCODER)
    scale_weight(model, f"{VALUE}.weight.transposed.value", 1e5)
    scale_weight(model, f"{VALUE}.bias.{VALUE}.weight.transposed.value", 1e5)
    scale_weight(model, "model.encoder.layers.1.self_attn.projection.weight.transposed", 1e-5)
    save_graph(model, path)
    return path


def test_planted_overflow_breaks_naive_fp16_and_is_kept_right(overflowing: Path, tmp_path: Path) -> None:
    naive, ours = tmp_path / "naive.onnx", tmp_path / "ours.onnx"
    converted(ir.load(overflowing), naive)
    assert stage_difference(overflowing, naive, FEEDS[ENCODER]).min_token_cosine < 0.9
    found = find_nonfinite(naive, FEEDS[ENCODER])
    assert found is not None
    assert found.layer.startswith("model.encoder.layers.1.self_attn")

    keep = choose_float32_nodes(ir.load(overflowing), observed(overflowing, FEEDS[ENCODER]))
    report = converted(ir.load(overflowing), ours, keep=keep)
    assert keep.items() <= report.float32.items()
    assert len(keep) <= 8, "one attention's values, and nothing of the other layers"
    check_types(ours)
    # Another seed than calibration saw.
    unseen = random_feeds("pixel_values", (1, 3, 80, 80), seed=1)
    assert stage_difference(overflowing, ours, unseen).min_token_cosine > 0.9999
    assert find_nonfinite(ours, unseen, intermediates=True) is None


@pytest.fixture(scope="module")
def observations(small_bundle: Path) -> Observations:
    """What the encoder computes, for Q/DQ too."""
    path = small_bundle / ENCODER
    return observed(path, FEEDS[ENCODER], plan_tensorrt(ir.load(path), precision="int8").watch)


def test_nothing_is_kept_where_nothing_overflows(small_bundle: Path, observations: Observations) -> None:
    assert choose_float32_nodes(ir.load(small_bundle / ENCODER), observations) == {}


def _stats(low: float, high: float, rows: np.ndarray | None = None) -> TensorStats:
    return TensorStats(low, high, {}, rows=rows)


PRODUCT = "g (float[N,4] x) => (float[N,2] y) { a = Transpose<perm = [0, 1]>(x) y = MatMul(a, w) }"


@pytest.mark.parametrize(
    ("rows", "weight", "reason"),
    [
        ([[1, 1, 1, 1]], 1.0, None),
        ([[3e4, 0, 0, 0]], 1.0, "seen at 3e+04"),
        ([[9e3, -9e3, 9e3, -9.1e3]], 1.0, "partial sums may reach 3.61e+04"),
        ([[4000.0, -4000.5, 0, 0]], 1.0, "FP16 changes its result by"),
        ([[np.inf, 0, 0, 0]], 1.0, "seen at inf"),
    ],
)
def test_why_a_product_stays(rows: list[list[float]], weight: float, reason: str | None) -> None:
    array = np.array(rows, np.float32)
    model = from_text(PRODUCT, {"w": np.full((4, 2), weight, np.float32)})
    stats = {name: _stats(float(array.min()), float(array.max()), array) for name in ("a", "x")}
    chosen = choose_float32_nodes(model, Observations("", 1, stats))
    if reason is None:
        assert chosen == {}
    else:
        assert reason in chosen["MatMul_1"]


def test_a_range_follows_what_only_moves() -> None:
    model = from_text(
        "g (float[N,4] x) => (float[4,N] y) { a = Neg(x) b = Transpose<perm = [1, 0]>(a) y = Sigmoid(b) }"
    )
    chosen = choose_float32_nodes(model, Observations("", 1, {"x": _stats(-5.0, 2e4)}))
    assert sorted(chosen) == ["Neg_0", "Sigmoid_2", "Transpose_1"]


def test_a_sum_that_cancels_stays() -> None:
    model = from_text("g (float[N,4] x, float[N,4] z) => (float[N,4] y) { y = Sub(x, z) }")
    stats = {"x": _stats(0, 1000.0), "z": _stats(0, 1000.0), "y": _stats(-1.0, 2.0)}
    assert "whose sum is at most 2" in choose_float32_nodes(model, Observations("", 1, stats))["Sub_0"]
    stats["y"] = _stats(-900.0, 900.0)
    assert choose_float32_nodes(model, Observations("", 1, stats)) == {}


def test_watched_values_leave_out_what_only_moves() -> None:
    assert watched_values(from_text(PRODUCT, {"w": np.ones((4, 2), np.float32)})) == ("x", "y")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_qdq_graphs_have_scales_of_their_tensors_type(
    precision: str, small_bundle: Path, observations: Observations, tmp_path: Path
) -> None:
    source, path = small_bundle / ENCODER, tmp_path / "model.onnx"
    placement = PlaceTensorRT(observations.ranges("minmax"), precision=precision)
    report = converted(ir.load(source), path, placement)
    check_types(path)
    # A norm or a softmax that is quantised gives its numbers to Q in FP32: no Cast at all.
    assert report.casts < CASTS[ENCODER]
    kinds = {}
    for node in ir.load(path).graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            value = node.inputs[0] if node.op_type == "QuantizeLinear" else node.outputs[0]
            assert node.inputs[1] is not None
            assert value is not None
            kinds[node.name] = (value.dtype, node.inputs[1].dtype)
    assert set(kinds.values()) == {(HALF, HALF), (SINGLE, SINGLE)}
    # The two ends of a pair hold the same number, in whatever type.
    for node in ir.load(path).graph:
        if node.op_type == "QuantizeLinear":
            for reader, _ in node.outputs[0].uses():
                scales = [one.inputs[1].const_value.numpy() for one in (node, reader)]  # type: ignore[union-attr]
                assert float(scales[0]) == float(scales[1])
    # 8 bits without smoothing: measured 0.993 and 0.989. A scale of the wrong tensor gives less than 0.9.
    assert stage_difference(source, path, FEEDS[ENCODER]).min_token_cosine > 0.98


def test_decoder_with_its_cache(small_bundle: Path, tmp_path: Path) -> None:
    source, path = small_bundle / "llm/decoder.onnx", tmp_path / "decoder.onnx"
    model = ir.load(source)
    names = [value.name or "" for value in (*model.graph.inputs, *model.graph.outputs)]
    cache = [name for name in names if name.endswith((".key", ".value"))]
    converted(model, path, half_io=cache)
    half = ir.load(path)
    ends = {value.name: value.dtype for value in (*half.graph.inputs, *half.graph.outputs)}
    assert {ends[name] for name in cache} == {HALF}
    assert {ends["inputs_embeds"], ends["logits"]} == {SINGLE}
    assert node_types(half, "GroupQueryAttention") == {HALF}
    assert (
        node_types(half, "SkipSimplifiedLayerNormalization")
        == node_types(half, "SimplifiedLayerNormalization")
        == {SINGLE}
    )
    generator = np.random.default_rng(0)
    feed: Feed = {"inputs_embeds": 0.5 * generator.standard_normal((1, 10, 128), dtype=np.float32)}
    feed |= {"attention_mask": np.ones((1, 10), np.int64), "logits_position": np.array([9])}
    feed |= {name: np.zeros((1, 2, 64, 32), np.float32) for name in cache if name.startswith("past")}
    # Measured 0.9999999.
    assert stage_difference(source, path, [feed], outputs=["logits"]).min_token_cosine > 0.9999
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    session.run(None, {k: v.astype(np.float16) if k.startswith("past") else v for k, v in feed.items()})


def test_a_table_is_stored_in_half(tmp_path: Path) -> None:
    model = from_text(
        "g (int64[N] x) => (float[N,2,8] y) { a = Gather(t, x) b = Unsqueeze(a, i) y = Concat<axis = 1>(b, b) }",
        {"t": np.ones((50, 8), np.float32), "i": np.array([1])},
    )
    report = converted(model, tmp_path / "g.onnx")
    assert (report.half, report.casts) == (3, 1)
    check_types(tmp_path / "g.onnx")


NORM = """g (float[N,8] x) => (float[N,4] y) {
    s = Pow(x, two) m = ReduceMean(s, axis) e = Add(m, eps) r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) g = Mul(n, w)
    h = MatMul(x, v) y = MatMul(g, v)
}"""


def test_the_statistics_of_a_decomposed_norm_stay(tmp_path: Path) -> None:
    weights = {
        "two": np.array(2.0, np.float32),
        "axis": np.array([-1]),
        "eps": np.array(1e-6, np.float32),
        "w": np.ones(8, np.float32),
        "v": np.ones((8, 4), np.float32),
    }
    path = tmp_path / "g.onnx"
    report = converted(from_text(NORM, weights), path)
    # eps is below FP16's normal numbers and x² beyond its largest; the gain is where the result is rounded.
    assert [name.split("_")[0] for name in report.float32] == ["Pow", "ReduceMean", "Add", "Sqrt", "Reciprocal", "Mul"]
    check_types(path)
    # The input's square overflows.
    feed = {"x": np.linspace(250, 400, 16, dtype=np.float32).reshape(2, 8)}
    assert np.isfinite(open_values(path)(feed)["y"]).all()


@pytest.mark.parametrize(
    ("body", "weights", "stays"),
    [
        (
            "g (int64[N] p) => (float[N,4] y) { f = Cast<to = 1>(p) u = Unsqueeze(f, i) a = MatMul(u, w) "
            "c = Cos(a) y = MatMul(c, v) }",
            {"i": np.array([1]), "w": np.ones((1, 4), np.float32), "v": np.ones((4, 4), np.float32)},
            ["Cast_0", "Unsqueeze_1", "MatMul_2", "Cos_3"],
        ),
        (
            "g (bool[N] k, float[N] x) => (float[N] y) { b = Where(k, zero, low) s = Add(x, b) y = Sigmoid(s) }",
            {"zero": np.array(0.0, np.float32), "low": np.array(-3.4e38, np.float32)},
            ["Where_0", "Add_1"],
        ),
        (
            "g (float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }",
            {"w": np.full((4, 4), 1e5, np.float32)},
            ["MatMul_0"],
        ),
    ],
    ids=["angles", "mask", "weight"],
)
def test_what_must_stay(
    body: str,
    weights: dict[str, np.ndarray],
    stays: list[str],
    tmp_path: Path,
) -> None:
    report = converted(from_text(body, weights), tmp_path / "g.onnx")
    assert set(stays) <= set(report.float32)
    check_types(tmp_path / "g.onnx")


def test_types_that_attributes_and_inputs_fix(tmp_path: Path) -> None:
    body = """g (float[1,2,4,4] x) => (float[1,2,8,8] y) {
        r = Resize<mode = "linear">(x, , scales) s = Shape(r) f = ConstantOfShape<value = float[1] {0.5}>(s)
        h = Conv(r, w) y = Add(h, f)
    }"""
    weights = {"scales": np.array([1, 1, 2, 2], np.float32), "w": np.ones((2, 2, 1, 1), np.float32)}
    converted(from_text(body, weights), tmp_path / "g.onnx")
    check_types(tmp_path / "g.onnx")
    model = ir.load(tmp_path / "g.onnx")
    assert model.graph.initializers["scales"].dtype == SINGLE
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32)
    emulated = open_values(tmp_path / "g.onnx")({"x": x})["y"]
    # Two different implementations of a linear Resize, each rounded once: an ulp of FP16 near 8.
    np.testing.assert_allclose(emulated, reference_run(tmp_path / "g.onnx", {"x": x})["y"], atol=8e-3)


def test_weights_that_fp16_makes_zero_are_reported(tmp_path: Path) -> None:
    weight = np.full((4, 4), 0.5, np.float32)
    weight[0] = 1e-8
    model = from_text("g (float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", {"w": weight})
    assert converted(model, tmp_path / "g.onnx").flushed == {"w": 0.25}


def test_a_scale_never_becomes_zero(tmp_path: Path) -> None:
    body = "g (int8[N] x) => (float[N] y) { a = DequantizeLinear(x, s) y = Sigmoid(a) }"
    converted(from_text(body, {"s": np.array(1e-9, np.float32)}), tmp_path / "g.onnx")
    assert float(ir.load(tmp_path / "g.onnx").graph.initializers["s"].const_value.numpy()) > 0  # type: ignore[union-attr]


def test_what_is_refused(tmp_path: Path) -> None:
    model = from_text("g (float[N] x) => (float[N] y) { y = Sigmoid(x) }")
    for half, reason in (
        (ToFloat16(["Sigmoid_9"]), "no node Sigmoid_9"),
        (ToFloat16(half_io=["z"]), "no input or output z"),
        (ToFloat16(["Sigmoid_0"], half_io=["x"]), "Sigmoid_0 is to stay FP32, but its cache x is FP16"),
    ):
        with pytest.raises(ExportError, match=reason):
            apply_passes(model, [half], stage="encoder")
    branch = """g (bool b, float[N] x) => (float[N] y) {
        y = If(b) <
            then_branch = t () => (float[N] u) { u = Neg(x) }, else_branch = e () => (float[N] v) { v = Abs(x) }
        >
    }"""
    with pytest.raises(ExportError, match="If with a subgraph"):
        apply_passes(from_text(branch), [ToFloat16()], stage="encoder")
    converted(model, tmp_path / "g.onnx", keep_io=False)
    with pytest.raises(ExportError, match="nothing in it is FP32"):
        apply_passes(ir.load(tmp_path / "g.onnx"), [ToFloat16()], stage="encoder")
