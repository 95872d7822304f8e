"""Smoothing: groups, the float function kept, alphas, ranges, and what it is for: activation outliers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests.calibration.outliers import LAYERS, Place, export_encoder, load, outputs, pictures, plant, session, stats_of
from tests.export.graphs import float_value, make_model, weight

from bridgeport.calibration.collect import collect
from bridgeport.calibration.linears import find_linears
from bridgeport.calibration.observers import ObserverSettings
from bridgeport.calibration.placement import PlaceTensorRT, plan_tensorrt
from bridgeport.calibration.records import Observations
from bridgeport.calibration.smooth import smooth, values_to_watch
from bridgeport.calibration.smooth_fold import FoldSmoothing
from bridgeport.calibration.smooth_groups import find_groups
from bridgeport.calibration.smooth_stats import known
from bridgeport.errors import InputError
from bridgeport.export.passes import apply_passes
from bridgeport.runtime.parity.metrics import compare

# Scales are rounded to float32 once in each of two factors, and sums run over 64 to 192 of their products: measured
# 3e-6 of the RMS. One weight row that misses its scale by 1% moves some output by more than 1e-4 (tested below).
MAX_FLOAT_ERROR = 2e-5
SETTINGS = ObserverSettings(observers=("minmax", "percentile"))
CALIBRATION, UNSEEN = pictures(1, 16), pictures(2, 8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of a small CLIP encoder without outliers; do not change it."""
    return export_encoder(tmp_path_factory.mktemp("clip") / "model.onnx")


@pytest.fixture(scope="module")
def observed(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Place], tuple[ir.Model, Observations]]:
    """The CLIP encoder with outliers at a place, and what is seen in it; both made once."""
    made: dict[str, tuple[Path, Observations]] = {}

    def get(place: Place) -> tuple[ir.Model, Observations]:
        if place not in made:
            path = tmp_path_factory.mktemp(place) / "model.onnx"
            model = plant(load(clip), place)
            ir.save(model, path)
            watch = dict.fromkeys((*values_to_watch(model), *plan_tensorrt(model, precision="int8").watch))
            count = len(CALIBRATION)
            made[place] = path, collect(path, CALIBRATION, list(watch), key=place, samples=count, settings=SETTINGS)
        return load(made[place][0]), made[place][1]

    return get


def graph_of(bundle: Path, stage: str) -> ir.Model:
    """A stage of a bundle."""
    return load(bundle / ("llm/decoder.onnx" if stage == "llm" else f"{stage}/model.onnx"))


def some_inputs(model: ir.Model, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random inputs of a graph: batch 1, no past, all other dynamic axes 5."""
    rng = np.random.default_rng(seed)
    sizes = {"batch": 1, "past_sequence": 0}
    made: dict[str, NDArray[Any]] = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else sizes.get(str(dim.value), 5) for dim in value.shape or ()]
        floats = value.dtype == ir.DataType.FLOAT
        made[value.name or ""] = rng.normal(size=shape).astype(np.float32) if floats else np.ones(shape, np.int64)
    return made


def random_scales(model: ir.Model, seed: int = 3) -> dict[str, NDArray[np.float32]]:
    """A scale between about 0.02 and 50 for every channel of every group."""
    rng = np.random.default_rng(seed)
    return {
        group.name: np.exp(1.3 * rng.normal(size=group.width)).clip(0.02, 50).astype(np.float32)
        for group in find_groups(model)
    }


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        # Two layers: both norms, values -> output projection, and behind the GELU.
        ("encoder", {"norm": 4, "linear": 2, "mul": 2}),
        # Post-LN: the residual reads what the products read. The last LayerNorm goes to the projection alone.
        ("connector", {"norm": 1, "linear": 5, "mul": 12}),
        # RMSNorms, SwiGLU's up -> down; behind GroupQueryAttention and before lm_head nothing takes a scale.
        ("llm", {"norm": 4, "linear": 2, "mul": 3}),
    ],
)
def test_groups_of_blip2(blip2_bundle: Callable[[str], Path], stage: str, expected: dict[str, int]) -> None:
    model = graph_of(blip2_bundle("llama"), stage)
    groups = find_groups(model)
    assert Counter(group.kind for group in groups) == expected
    matmuls = [linear.node for linear in find_linears(model) if linear.op_type == "MatMul"]
    assert sorted(node for group in groups for node in group.nodes) == sorted(matmuls)  # each product in one group


def test_groups_of_clip(clip: Path) -> None:
    groups = find_groups(load(clip))
    assert Counter(group.kind for group in groups) == {"norm": 2 * LAYERS, "linear": LAYERS, "mul": LAYERS}
    assert [len(group.nodes) for group in groups[:4]] == [3, 1, 1, 1]  # query, key, value; output; fc1; fc2


@pytest.mark.parametrize("stage", ["encoder", "connector", "llm"])
def test_folding_keeps_the_float_function(blip2_bundle: Callable[[str], Path], stage: str) -> None:
    model = graph_of(blip2_bundle("llama"), stage)
    feed = some_inputs(model)
    before = outputs(model, [feed])
    scales = random_scales(model)
    model, (result,) = apply_passes(model, [FoldSmoothing(scales)], stage=stage)
    assert result.changed
    assert compare(before, outputs(model, [feed])).max_rel < MAX_FLOAT_ERROR


def test_the_tolerance_catches_one_forgotten_channel(clip: Path) -> None:
    model = load(clip)
    before = outputs(model, UNSEEN[:1])
    group = find_groups(model)[0]
    model, _ = FoldSmoothing({group.name: np.full(group.width, 2.0, np.float32)}).run(model)
    assert compare(before, outputs(model, UNSEEN[:1])).max_rel < MAX_FLOAT_ERROR
    value = group.products[2].value
    assert value.const_value is not None
    rows = value.const_value.numpy().copy()
    rows[5] *= 1.01
    value.const_value = ir.Tensor(rows, name=value.name)
    assert compare(before, outputs(model, UNSEEN[:1])).max_rel > 5 * MAX_FLOAT_ERROR


def product(x: ir.Value, name: str, rows: int, columns: int, rng: np.random.Generator) -> ir.Node:
    return named(ir.node("MatMul", [x, weight(f"{name}.weight", rng.normal(size=(rows, columns)).astype("f4"))]), name)


def named(node: ir.Node, name: str) -> ir.Node:
    node.name, node.outputs[0].name = name, f"{name}.out"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return node


def chain(kind: str) -> ir.Model:
    """A graph `x` `[n, 4]` -> ... -> a product `last` with one operator before it that smoothing can use or not."""
    rng = np.random.default_rng(0)
    x = float_value("x", "n", 4)
    first = product(x, "first", 4, 4, rng)
    nodes = [first]
    if kind == "relu":
        nodes.append(named(ir.node("Relu", [first.outputs[0]]), "relu"))
    elif kind == "gated":
        gate = named(ir.node("Sigmoid", [x]), "gate")
        nodes += [gate, named(ir.node("Mul", [gate.outputs[0], first.outputs[0]]), "gated")]
    elif kind == "vector":
        gain = weight("gain", rng.uniform(0.5, 2, 4).astype("f4"))
        nodes.append(named(ir.node("Mul", [gain, first.outputs[0]]), "times"))
    elif kind == "gelu":
        nodes.append(named(ir.node("Gelu", [first.outputs[0]]), "gelu"))
    elif kind == "seen twice":
        nodes.append(named(ir.node("Relu", [first.outputs[0]]), "relu"))
    value = nodes[-1].outputs[0]
    last = ir.node(
        "Gemm", [value, weight("last.weight", rng.normal(size=(3, 4)).astype("f4"))], {"transB": 1}, name="last"
    )
    nodes.append(named(last, "last"))
    last.outputs[0].shape = ir.Shape(["n", 3])
    results = [last.outputs[0]]
    if kind == "seen twice":
        value.shape = ir.Shape(["n", 4])
        results.append(value)
    return make_model([x], results, nodes)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("relu", "linear"),
        ("gated", "linear"),
        ("plain", "linear"),
        ("vector", "norm"),
        ("gelu", "mul"),
        ("seen twice", "mul"),
    ],
)
def test_where_the_scale_of_one_product_goes(kind: str, expected: str) -> None:
    model = chain(kind)
    group = next(group for group in find_groups(model) if group.nodes == ("last",))
    assert group.kind == expected
    feed = {"x": np.random.default_rng(1).normal(size=(6, 4)).astype("f4")}
    before = session(model).run(None, feed)
    size = len(model.graph)
    scale = np.array([0.1, 30, 1, 4], np.float32)
    model, _ = apply_passes(model, [FoldSmoothing({group.name: scale})], stage="test")
    assert len(model.graph) == size + (expected == "mul")
    for old, new in zip(before, session(model).run(None, feed), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)  # sums of 4 products; a wrong scale is off by 10%


def test_weights_that_others_read_are_left_to_them() -> None:
    rng = np.random.default_rng(0)
    x, other = float_value("x", "n", 4), float_value("other", "n", 4)
    gain, shift = weight("gain", np.ones(4, "f4")), weight("shift", np.zeros(4, "f4"))
    shared = weight("shared.weight", rng.normal(size=(4, 3)).astype("f4"))
    norm = named(ir.node("LayerNormalization", [x, gain, shift], {"axis": -1}), "norm")
    twice = named(ir.node("LayerNormalization", [other, gain, shift], {"axis": -1}), "twice")
    left = named(ir.node("MatMul", [norm.outputs[0], shared]), "left")
    right = named(ir.node("MatMul", [twice.outputs[0], shared]), "right")
    for node in (left, right):
        node.outputs[0].shape = ir.Shape(["n", 3])
    model = make_model([x, other], [left.outputs[0], right.outputs[0]], [norm, twice, left, right])
    feed = {name: rng.normal(size=(5, 4)).astype("f4") for name in ("x", "other")}
    before = session(model).run(None, feed)
    model, _ = FoldSmoothing({"norm.out": np.array([8, 0.5, 3, 1], np.float32)}).run(model)
    after = session(model).run(None, feed)
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after[1], before[1])
    assert right.inputs[1] is shared


def test_weights_are_scaled_when_they_are_read(clip: Path) -> None:
    """A stage is never in memory twice."""
    model = load(clip)
    model, _ = FoldSmoothing(random_scales(model)).run(model)
    weights = [weight.value.const_value for group in find_groups(model) for weight in group.products]
    assert all(isinstance(tensor, ir.LazyTensor) and not tensor.cache for tensor in weights)
    assert not any(name.endswith("fc1.weight.transposed") for name in model.graph.initializers)


def test_scales_of_unknown_activations_are_refused(clip: Path) -> None:
    assert "no_such_value" in (FoldSmoothing({"no_such_value": np.ones(4, "f4")}).requires(load(clip)) or "")


def test_off_is_off(observed: Callable[[Place], tuple[ir.Model, Observations]]) -> None:
    model, observations = observed("norm")
    before = outputs(model, UNSEEN)
    names = list(model.graph.initializers)
    result = smooth(model, observations, alphas=(None,))
    assert set(result.alphas.values()) == {None}
    assert not result.ranges
    assert list(result.model.graph.initializers) == names
    np.testing.assert_array_equal(outputs(result.model, UNSEEN), before)


def test_a_model_without_outliers_is_no_worse(observed: Callable[[Place], tuple[ir.Model, Observations]]) -> None:
    model, observations = observed("none")
    plain = cosine(model, observations, "percentile")
    result = smooth(model, observations)
    assert all(group.error <= group.error_off for group in result.groups)
    assert all(group.alpha is None for group in result.groups if group.kind == "mul")  # no operator for nothing
    alphas = [alpha for alpha in result.alphas.values() if alpha is not None]
    assert np.mean(alphas) < 0.6  # strong smoothing fits the observed rows and clips others
    # 0.002 is what two of 16 calibration pictures more or less move the worst token by.
    assert cosine(result.model, result.observations, "percentile") > plain - 0.002


def test_smoothing_is_deterministic(observed: Callable[[Place], tuple[ir.Model, Observations]]) -> None:
    results = [smooth(*observed("norm")) for _ in range(2)]
    assert results[0].groups == results[1].groups
    assert results[0].ranges == results[1].ranges
    one, other = (ir.to_proto(result.model).SerializeToString(deterministic=True) for result in results)
    assert one == other


def test_new_statistics_are_those_of_the_smoothed_graph(
    observed: Callable[[Place], tuple[ir.Model, Observations]], tmp_path: Path
) -> None:
    model, observations = observed("feed-forward")  # has groups of all three kinds, and quantised attention
    result = smooth(model, observations, observer="percentile", settings=SETTINGS)
    kinds = {group.kind for group in result.groups if group.alpha is not None}
    assert kinds == {"norm", "linear", "mul"}
    ir.save(result.model, tmp_path / "model.onnx")
    again = collect(
        tmp_path / "model.onnx", CALIBRATION, list(result.ranges), key="", samples=len(CALIBRATION), settings=SETTINGS
    )
    moved = set(result.ranges) & set(observations.tensors)
    assert any(name.startswith("transpose") for name in moved)  # values split into heads
    for name, stats in again.tensors.items():
        made = result.observations.tensors[name]
        # Extremes come from channels whose rounding differs in the last bits only.
        assert made.minimum == pytest.approx(stats.minimum, rel=1e-4)
        assert made.maximum == pytest.approx(stats.maximum, rel=1e-4)
        np.testing.assert_allclose(known(made.channel_max), known(stats.channel_max), rtol=1e-3, atol=1e-4)
        assert made.ranges["minmax"].absmax == pytest.approx(stats.ranges["minmax"].absmax, rel=1e-4)
        # 512 rows stand for all: a wrong scale would be off by a factor of 2 and more.
        assert result.ranges[name].absmax == pytest.approx(stats.ranges["percentile"].absmax, rel=0.25)


def cosine(model: ir.Model, observations: Observations, observer: str, **options: Any) -> float:
    """Worst-token cosine of `model` in INT8 as TensorRT gets it, against its float self, on pictures not seen."""
    quantised, _ = PlaceTensorRT(observations.ranges(observer), precision="int8", **options).run(model.clone())
    return compare(outputs(model, UNSEEN), outputs(quantised, UNSEEN)).min_token_cosine


LINEARS: Mapping[str, Any] = {"residuals": False, "attention": False}


@pytest.mark.parametrize("place", ["norm", "feed-forward"])
def test_outlier_channels(
    observed: Callable[[Place], tuple[ir.Model, Observations]], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """INT8 min-max of all linears breaks the encoder; smoothed it stays whole, attention and residuals in INT8 too."""
    model, observations = observed(place)
    plain = cosine(model, observations, "minmax", **LINEARS)
    result = smooth(model, observations, observer="percentile", settings=SETTINGS)
    ours = cosine(result.model, result.observations, "percentile")
    with capsys.disabled():
        print(f"\noutliers {place}: plain INT8 {plain:.4f}, smoothed {ours:.4f} (worst token)")
    assert plain < 0.9
    assert ours >= 0.99


def test_massive_activations(
    observed: Callable[[Place], tuple[ir.Model, Observations]], capsys: pytest.CaptureFixture[str]
) -> None:
    """One massive token in the residual stream: smoothing the linears is needed and is not enough; the residual Adds,
    whose input is the stream itself, must stay in float.
    """
    model, observations = observed("massive")
    plain = cosine(model, observations, "minmax")
    kept = cosine(model, observations, "percentile", residuals=False)
    result = smooth(model, observations, observer="percentile", settings=SETTINGS)
    smoothed = cosine(result.model, result.observations, "percentile")
    ours = cosine(result.model, result.observations, "percentile", residuals=False)
    with capsys.disabled():
        print(
            f"\nmassive activations: plain INT8 {plain:.4f}, residuals in float {kept:.4f}, smoothed {smoothed:.4f}, "
            f"both {ours:.4f} (worst token)"
        )
    assert max(plain, smoothed) < 0.9
    assert kept < 0.99 <= ours


def test_groups_that_were_not_observed_are_left_and_say_so(clip: Path) -> None:
    empty = smooth(load(clip), Observations("", 1, {}))
    assert {group.skipped for group in empty.groups} == {"its input was not observed"}
    groups = find_groups(load(clip))
    narrow = stats_of(np.ones((8, 3), "f4"))
    result = smooth(load(clip), Observations("", 1, {groups[0].name: narrow}))
    assert "3 channels, the weights have 64" in (result.groups[0].skipped or "")
    # Quantised attention reads the values by heads, and nobody looked at them before.
    split, whole = stats_of(np.ones((8, 16), "f4")), stats_of(np.ones((8, 64), "f4"))
    tensors = {groups[1].name: whole, groups[1].by_head[-1][0]: split}
    result = smooth(load(clip), Observations("", 1, tensors))
    assert "which its new range follows from" in (result.groups[1].skipped or "")


def test_bad_arguments_are_refused(clip: Path) -> None:
    observations = Observations("", 1, {"x": stats_of(np.ones((2, 2), "f4"))})
    with pytest.raises(InputError, match=r"alpha 1\.5; accepted are numbers between 0 and 1"):
        smooth(load(clip), observations, alphas=(1.5,))
    with pytest.raises(InputError, match=r"'mse' did not run; those that did are \['minmax'\]"):
        smooth(load(clip), observations, observer="mse")
