"""The ranking of layers against a model of the same network in numpy, one layer quantised at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from bridgeport.calibration.linears import find_linears
from bridgeport.calibration.records import TensorRange
from bridgeport.calibration.sensitivity import LayerDamage, affordable_samples, rank_layers, round_weight
from bridgeport.errors import CalibrationError

Array = NDArray[np.float64]
Rounding = Callable[[Array], Array]
BLOCKS, WIDTH, HIDDEN, TOKENS = 4, 16, 32, 6
OUTLIER_BLOCK = 2
# x + V relu(W tanh(x)) for each block; the last one also adds what went in at the start, which so stays alive over all
# cuts. The first block has two products that read the same value.
BODY = """
    t0 = Tanh (x)  a0 = MatMul (t0, w0)  s0 = MatMul (t0, u0)  r0 = Relu (a0)  m0 = MatMul (r0, v0)  n0 = Add (m0, s0)
    h0 = Add (x, n0)
    t1 = Tanh (h0)  a1 = MatMul (t1, w1)  r1 = Relu (a1)  m1 = MatMul (r1, v1)  h1 = Add (h0, m1)
    t2 = Tanh (h1)  a2 = MatMul (t2, w2)  r2 = Relu (a2)  m2 = MatMul (r2, v2)  h2 = Add (h1, m2)
    t3 = Tanh (h2)  a3 = MatMul (t3, w3)  r3 = Relu (a3)  m3 = MatMul (r3, v3)  h3 = Add (h2, m3)
    y = Add (h3, x)
"""
GRAPH = f"""
<ir_version: 9, opset_import: ["" : 20]>
blocks (float[batch, {TOKENS}, {WIDTH}] x) => (float[batch, {TOKENS}, {WIDTH}] y)
{{ {BODY} }}
"""


@pytest.fixture(scope="module")
def weights() -> dict[str, Array]:
    """Block 2 has one hidden channel that is 500 times as large, and the next product takes it back."""
    rng = np.random.default_rng(0)
    made: dict[str, Array] = {"u0": rng.standard_normal((WIDTH, WIDTH)) / 8}
    for block in range(BLOCKS):
        made[f"w{block}"] = rng.standard_normal((WIDTH, HIDDEN)) / 4
        made[f"v{block}"] = rng.standard_normal((HIDDEN, WIDTH)) / 8
    made[f"w{OUTLIER_BLOCK}"][:, 5] *= 500
    made[f"v{OUTLIER_BLOCK}"][5] /= 500
    return {name: value.astype(np.float32).astype(np.float64) for name, value in made.items()}


@pytest.fixture(scope="module")
def graph(weights: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = onnx.parser.parse_model(GRAPH)
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    for name, value in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    file = tmp_path_factory.mktemp("blocks") / "model.onnx"
    onnx.save(model, file, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return file


@pytest.fixture(scope="module")
def feeds() -> list[dict[str, NDArray[Any]]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((batch, TOKENS, WIDTH), dtype=np.float32)} for batch in (1, 2)]


def network(x: Array, weights: dict[str, Array], rounding: dict[str, Rounding]) -> dict[str, Array]:
    """All values of the graph; what a product reads goes through `rounding`, by the product's weight."""
    values: dict[str, Array] = {"x": x}
    h = x
    for block in range(BLOCKS):
        t = np.tanh(h)
        r = np.maximum(rounding.get(f"w{block}", np.array)(t) @ weights[f"w{block}"], 0)
        m = rounding.get(f"v{block}", np.array)(r) @ weights[f"v{block}"]
        if block == 0:
            m = m + rounding.get("u0", np.array)(t) @ weights["u0"]
        h = h + m
        values |= {f"t{block}": t, f"r{block}": r}
    return values | {"y": h + x}


def static(chosen: TensorRange) -> Rounding:
    scale = chosen.absmax / 127
    return lambda value: np.clip(np.rint(value / scale), -128, 127) * scale


def dynamic(value: Array) -> Array:
    low, high = min(float(value.min()), 0.0), max(float(value.max()), 0.0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return np.asarray((np.clip(np.rint(value / scale) + zero, 0, 255) - zero) * scale)


def expected(
    name: str, weights: dict[str, Array], feeds: list[dict[str, NDArray[Any]]], rounding: Rounding
) -> tuple[float, float]:
    """Damage of quantising the products with the weights in `name` (joined by "+"), by numpy."""
    names = name.split("+")
    rounded = weights | {one: round_weight(weights[one].astype(np.float32), 1, 8).astype(np.float64) for one in names}
    losses, errors = [], []
    for feed in feeds:
        x = feed["x"].astype(np.float64)
        reference, actual = network(x, weights, {})["y"], network(x, rounded, dict.fromkeys(names, rounding))["y"]
        norms = np.linalg.norm(reference, axis=-1) * np.linalg.norm(actual, axis=-1)
        losses.append(1 - float(((reference * actual).sum(axis=-1) / norms).min()))
        errors.append(float(((actual - reference) ** 2).mean() / (reference**2).mean()))
    return max(losses), float(np.mean(errors))


@pytest.fixture(scope="module")
def ranges(weights: dict[str, Array], feeds: list[dict[str, NDArray[Any]]]) -> dict[str, TensorRange]:
    values = [network(feed["x"].astype(np.float64), weights, {}) for feed in feeds]
    return {
        name: TensorRange(min(float(one[name].min()) for one in values), max(float(one[name].max()) for one in values))
        for name in values[0]
    }


LAYERS = {  # the layer's first node: its weights, and what it reads
    "node_a0": ("w0+u0", "t0"),
    "node_m0": ("v0", "r0"),
    "node_a1": ("w1", "t1"),
    "node_m1": ("v1", "r1"),
    "node_a2": ("w2", "t2"),
    "node_m2": ("v2", "r2"),
    "node_a3": ("w3", "t3"),
    "node_m3": ("v3", "r3"),
}


@pytest.mark.parametrize("activations", ["static", "dynamic", "float"])
def test_each_layers_damage_is_that_of_quantising_it_alone(
    activations: Any,
    graph: Path,
    feeds: list[dict[str, NDArray[Any]]],
    weights: dict[str, Array],
    ranges: dict[str, TensorRange],
) -> None:
    """Against numpy in float64, whose roundings of a tie differ: 0.5 %, where 126 steps for 127 are 1.6 % off and a
    layer taken for its neighbour a factor. The first layer's two products are one.
    """
    ranked = {one.nodes[0]: one for one in rank_layers(graph, feeds, ranges, activations=activations)}
    assert ranked.keys() == LAYERS.keys()
    assert ranked["node_a0"].nodes == ("node_a0", "node_s0")
    for node, (names, value) in LAYERS.items():
        roundings: dict[str, Rounding] = {"static": static(ranges[value]), "dynamic": dynamic, "float": np.array}
        rounding = roundings[activations]
        loss, error = expected(names, weights, feeds, rounding)
        assert ranked[node].relative_mse == pytest.approx(error, rel=0.005), node
        assert ranked[node].cosine_loss == pytest.approx(loss, rel=0.005), node


def test_a_planted_outlier_is_found_first(
    graph: Path, feeds: list[dict[str, NDArray[Any]]], ranges: dict[str, TensorRange]
) -> None:
    """The channel of 500 leaves the others 0 or 1 steps; nothing else comes near."""
    ranked = rank_layers(graph, feeds, ranges)
    assert ranked[0].nodes == (f"node_m{OUTLIER_BLOCK}",)
    assert ranked[0].cosine_loss > 50 * ranked[1].cosine_loss
    assert list(ranked) == sorted(ranked, key=lambda one: (-one.cosine_loss, -one.relative_mse, one.index))


def test_the_same_ranking_every_time(
    graph: Path, feeds: list[dict[str, NDArray[Any]]], ranges: dict[str, TensorRange]
) -> None:
    assert rank_layers(graph, feeds, ranges) == rank_layers(graph, feeds, ranges)


def test_nothing_before_a_layer_runs_twice(
    graph: Path, feeds: list[dict[str, NDArray[Any]]], ranges: dict[str, TensorRange], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight layers, the segment before them: each segment runs once for the untouched graph, once for its own layer
    and once for every layer before it.
    """
    from bridgeport.calibration.segments import SegmentedGraph

    runs = []
    run = SegmentedGraph.run
    monkeypatch.setattr(SegmentedGraph, "run", lambda *args: runs.append(1) or run(*args))  # type: ignore[func-returns-value]
    seen: list[tuple[int, int]] = []
    rank_layers(graph, feeds[:1], ranges, progress=lambda *args: seen.append(args))
    assert len(runs) == 9 + 8 + sum(range(8))
    assert seen == [(index, 9) for index in range(1, 10)]


def test_what_has_no_range_keeps_its_activation(
    graph: Path, feeds: list[dict[str, NDArray[Any]]], ranges: dict[str, TensorRange]
) -> None:
    """As placement leaves a constant activation alone."""
    static_ranges: dict[str, TensorRange] = {"r2": TensorRange(0.0, 0.0)}
    assert rank_layers(graph, feeds, static_ranges) == rank_layers(graph, feeds, ranges, activations="float")


def test_only_the_given_layers_are_tried(
    graph: Path, feeds: list[dict[str, NDArray[Any]]], ranges: dict[str, TensorRange]
) -> None:
    all_of_them = {one.nodes: one for one in rank_layers(graph, feeds, ranges)}
    some = [one for one in find_linears(ir.load(graph)) if one.node in ("node_m1", "node_a3")]
    ranked = rank_layers(graph, feeds, ranges, linears=some[::-1])
    assert {one.nodes for one in ranked} == {("node_m1",), ("node_a3",)}
    for one in ranked:
        assert (one.cosine_loss, one.relative_mse) == (
            all_of_them[one.nodes].cosine_loss,
            all_of_them[one.nodes].relative_mse,
        )


def test_gemm_and_convolution_are_rounded_by_output_channel(tmp_path: Path) -> None:
    """One output channel is 1000 times as large: scales along the other axis would wipe the small ones out."""
    text = """
    <ir_version: 9, opset_import: ["" : 20]>
    stem (float[batch, 3, 4, 4] x) => (float[batch, 5] y)
    { c = Conv <kernel_shape = [4, 4]> (x, kernel)  f = Flatten (c)  y = Gemm <transB = 1> (f, w, b) }
    """
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(text)
    kernel = rng.standard_normal((6, 3, 4, 4)).astype(np.float32)
    kernel[0] *= 1000
    w = rng.standard_normal((5, 6)).astype(np.float32)
    w[:, 0] /= 1000
    values = {"kernel": kernel, "w": w, "b": np.zeros(5, np.float32)}
    for name, value in values.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    for node in model.graph.node:
        node.name = node.output[0]
    onnx.save(model, tmp_path / "model.onnx")
    feed = {"x": rng.standard_normal((3, 3, 4, 4)).astype(np.float32)}
    ranked = {one.nodes: one for one in rank_layers(tmp_path / "model.onnx", [feed], {}, activations="float")}
    assert ranked.keys() == {("c",), ("y",)}
    assert ranked["c",].relative_mse < 1e-3
    # Gemm's small column belongs to an input: rounding by output channel loses it, which is what INT8 does.
    product = np.einsum("bchw,ochw->bo", feed["x"], kernel)
    rounded = round_weight(w, 0, 8)
    error = ((product @ (rounded - w).T) ** 2).mean() / ((product @ w.T) ** 2).mean()
    assert ranked["y",].relative_mse == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"feeds": []}, "0 samples and 8 layers"),
        ({"linears": []}, "0 layers"),
        ({"output": "logits"}, "no output 'logits'; its outputs are y"),
        ({"bits": 16}, "2 to 8"),
        ({"feeds": [{"x": np.ones((1, 2, 3), np.float32)}]}, "does not run"),
        ({"feeds": [{"pixels": np.ones(1)}]}, "no input 'x'"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    graph: Path,
    feeds: list[dict[str, NDArray[Any]]],
    ranges: dict[str, TensorRange],
    options: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(CalibrationError, match=said):
        rank_layers(graph, options.pop("feeds", feeds), ranges, **options)


def test_samples_that_the_time_of_calibration_pays_for() -> None:
    """L / 2 runs for each sample; 24 layers of a ViT are 97 layers here."""
    assert affordable_samples(32, 97) == 1
    assert affordable_samples(128, 97) == 5
    assert affordable_samples(8, 97) == 1


@pytest.mark.slow
def test_real_stages_are_ranked(blip2_bundle: Callable[[str], Path]) -> None:
    """The vision tower, whose patch embedding is a Conv, and a Q-Former, whose layers read the picture again."""
    from bridgeport.bundle import Bundle

    bundle = Bundle.load(blip2_bundle("llama"))
    for stage in ("encoder", "connector"):
        contract = bundle.manifest.stage(stage).contract
        rng = np.random.default_rng(0)
        shapes = {spec.name: [2 if isinstance(dim, str) else dim for dim in spec.shape] for spec in contract.inputs}
        feed = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        file = bundle.graph(stage)
        ranked: tuple[LayerDamage, ...] = rank_layers(file, [feed], {}, activations="dynamic")
        linears = find_linears(ir.load(file))
        assert sorted(node for one in ranked for node in one.nodes) == sorted(one.node for one in linears)
        assert all(0 < one.relative_mse < 0.1 for one in ranked), stage
        assert all(one.layer for one in ranked)
