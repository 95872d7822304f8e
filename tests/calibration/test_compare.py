"""Changed graphs against what they were made from: outputs, layers, and the layer to blame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tests.calibration.float16 import Feed, converted, from_text, random_feeds, scale_weight

from bridgeport.calibration.compare import (
    LayerDifference,
    blame,
    compare_graphs,
    stage_difference,
    worst_token_cosine,
)
from bridgeport.calibration.outputs import find_nonfinite, require_finite
from bridgeport.calibration.smooth_fold import FoldSmoothing
from bridgeport.errors import CheckFailed, InputError
from bridgeport.export.graph import save_graph
from bridgeport.export.passes import apply_passes

FEEDS = random_feeds("pixel_values", (1, 3, 80, 80))
FC1 = "model.encoder.layers.{}.mlp.fc1"


@pytest.fixture(scope="module")
def encoder(small_bundle: Path) -> Path:
    return small_bundle / "encoder/model.onnx"


def _changed(encoder: Path, path: Path, layer: int, *, columns: slice, factor: float) -> Path:
    """The encoder with some columns of one layer's first feed-forward weight scaled."""
    model = ir.load(encoder)
    name = f"{FC1.format(layer)}.weight.transposed"
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[:, columns] *= np.float32(factor)
    value.const_value = ir.Tensor(array, name=name)
    save_graph(model, path)
    return path


def test_a_graph_equals_itself(encoder: Path) -> None:
    layers = compare_graphs(encoder, encoder, FEEDS)
    assert all(one.difference.max_abs == one.isolated.max_abs == one.jump == 0 for one in layers)
    assert len({one.value for one in layers}) == len(layers)
    # The skip connections of a block are two, with another layer between them.
    assert [one.value for one in layers if one.layer == "model.encoder.layers.0"] == ["add_104", "add_125"]
    assert layers[0].value == "conv2d"
    assert layers[-1].layer == "model.post_layernorm"


@pytest.mark.parametrize("layer", [0, 2])
def test_a_planted_fault_is_blamed_on_its_layer(layer: int, encoder: Path, tmp_path: Path) -> None:
    # On top of FP16, so that every layer has an error of its own.
    faulty = _changed(encoder, tmp_path / "faulty.onnx", layer, columns=slice(0, 64), factor=1.5)
    candidate = tmp_path / "half.onnx"
    converted(ir.load(faulty), candidate)
    layers = compare_graphs(encoder, candidate, FEEDS)
    worst = blame(layers)
    assert worst is not None
    assert (worst.layer, worst.op_type) == (FC1.format(layer), "Add")
    others = [one for one in layers if one is not worst]
    # Measured: 0.25 against 2e-3. What the fault does further on is not theirs.
    assert worst.jump > 20 * max(one.jump for one in others)
    # But it piles up: after the fault every layer is off, before it none.
    at = layers.index(worst)
    assert min(one.difference.max_rel for one in layers[at:]) > 5 * max(one.difference.max_rel for one in layers[:at])


def test_parts_give_what_the_whole_gives(encoder: Path, tmp_path: Path) -> None:
    faulty = _changed(encoder, tmp_path / "faulty.onnx", 1, columns=slice(0, 8), factor=2.0)
    values = ["linear_1", "gelu", "linear_5", "linear_6"]
    whole, parts = (compare_graphs(encoder, faulty, FEEDS[:1], values=values, values_per_run=n) for n in (4, 2))
    assert whole == parts


def test_smoothed_values_are_not_compared(encoder: Path, tmp_path: Path) -> None:
    scales = np.linspace(0.25, 8.0, 96, dtype=np.float32)
    model, _ = apply_passes(ir.load(encoder), [FoldSmoothing({"layer_norm": scales})], stage="encoder")
    save_graph(model, tmp_path / "smoothed.onnx")
    layers = compare_graphs(encoder, tmp_path / "smoothed.onnx", FEEDS[:1])
    assert "layer_norm" not in {one.value for one in layers}
    # Only the order of FP32's roundings changed.
    assert max(one.jump for one in layers) < 1e-4


def test_values_of_choice(encoder: Path) -> None:
    layers = compare_graphs(encoder, encoder, FEEDS[:1], values=["softmax", "gelu"])
    assert [(one.value, one.op_type) for one in layers] == [("softmax", "Softmax"), ("gelu", "Gelu")]
    with pytest.raises(InputError, match="'nothing' is not a float that both graphs compute"):
        compare_graphs(encoder, encoder, FEEDS[:1], values=["nothing"])


def test_what_cannot_be_compared(encoder: Path, small_bundle: Path) -> None:
    with pytest.raises(InputError, match="one sample at least"):
        compare_graphs(encoder, encoder, [])
    with pytest.raises(InputError, match="one sample at least"):
        stage_difference(encoder, encoder, [])
    with pytest.raises(InputError, match="no output of floats in common"):
        stage_difference(encoder, small_bundle / "connector/model.onnx", FEEDS)
    assert blame([]) is None


def test_stage_difference_is_the_worst_sample_and_reads_one_at_a_time(tmp_path: Path) -> None:
    weight = np.eye(4, dtype=np.float32)
    one, other = tmp_path / "one.onnx", tmp_path / "other.onnx"
    for path, shift in ((one, 0.0), (other, 0.5)):
        model = from_text("g (float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", {"w": weight + shift})
        save_graph(model, path)
    mild, bad = np.array([[1, 0, 0, 0]], np.float32), np.array([[1, 1, 1, -1]], np.float32)

    def feeds() -> Iterator[Feed]:
        for array in (mild, bad, mild):
            yield {"x": array}

    # y = x and y = x + sum(x) / 2: (1.5, .5, .5, .5) against (1, 0, 0, 0), (2, 2, 2, 0) against (1, 1, 1, -1).
    expected = min(1.5 / np.sqrt(3.0), 6 / np.sqrt(12 * 4))
    found = stage_difference(one, other, feeds())
    assert found.min_token_cosine == pytest.approx(expected, rel=1e-6)
    assert found.max_abs == pytest.approx(1.0)
    assert worst_token_cosine(bad, bad * np.float32(np.nan)) == -1.0


def test_require_finite_names_the_first_node_of_the_graph(encoder: Path, tmp_path: Path) -> None:
    require_finite(encoder, FEEDS[:1], stage="encoder")
    model = ir.load(encoder)
    scale_weight(model, f"{FC1.format(1)}.weight.transposed", float("inf"))
    path = tmp_path / "model.onnx"
    save_graph(model, path)
    with pytest.raises(CheckFailed, match=r"stage encoder: \S+, which MatMul \S+ computes in " + FC1.format(1)):
        require_finite(path, FEEDS[:1], stage="encoder")


def test_an_infinity_that_vanishes_is_found_on_request(tmp_path: Path) -> None:
    model = from_text("g (float[N] x) => (float[N] y) { a = Div(x, z) y = Sigmoid(a) }", {"z": np.zeros(1, np.float32)})
    save_graph(model, tmp_path / "g.onnx")
    feeds = [{"x": np.array([1.0, 2.0], np.float32)}]
    assert find_nonfinite(tmp_path / "g.onnx", feeds) is None
    found = find_nonfinite(tmp_path / "g.onnx", feeds, intermediates=True)
    assert found is not None
    assert found.as_text() == "a, which Div Div_0 computes in Div_0, is inf at [0] of sample 0"


def test_jump_sees_gains_as_well_as_turns(tmp_path: Path) -> None:
    one, other = tmp_path / "one.onnx", tmp_path / "other.onnx"
    for path, gain in ((one, 1.0), (other, 1.25)):
        model = from_text("g (float[N,4] x) => (float[N,4] y) { y = Mul(x, w) }", {"w": np.array(gain, np.float32)})
        save_graph(model, path)
    layers: tuple[LayerDifference, ...] = compare_graphs(one, other, [{"x": np.ones((1, 4), np.float32)}])
    assert layers[0].isolated.min_token_cosine == pytest.approx(1.0)
    assert layers[0].jump == pytest.approx(0.25)
