"""Every rule of explicit quantisation: a clean graph, a graph in which only that rule is broken, foreign quantisers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass
from tests.calibration.blocks import block_inputs, block_model, node_of, quantized
from tests.calibration.rule_plants import PLANTS, blocked_linear, rewire, to_float16
from tests.export.graphs import make_model, weight

from bridgeport.calibration import QuantizeOptions, stages
from bridgeport.calibration.rules import RULES, check_rules
from bridgeport.calibration.stages import quantize_stage
from bridgeport.errors import CheckFailed, InputError


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule_finds_its_plant(rule: Any) -> None:
    model, precision, node = PLANTS[rule.name]()
    found = check_rules(model, precision=precision)
    assert found, "nothing found"
    mine = [one for one in found if one.rule == rule.name]
    assert mine, [one.as_text() for one in found]
    assert mine[0].node == node
    assert mine[0].severity == rule.severity
    assert rule.why in mine[0].why
    assert mine[0].fix == rule.fix


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_plant_breaks_little_else(rule: Any) -> None:
    """A plant that many rules report would say nothing about its own: two more at most."""
    model, precision, _ = PLANTS[rule.name]()
    others = {one.rule for one in check_rules(model, precision=precision)} - {rule.name}
    assert len(others) <= 2, others


def test_a_graph_that_breaks_a_rule_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of FP16, which comes after Q/DQ was placed and looked at."""
    model, _, node = PLANTS["float16-norm"]()
    clean, _ = CLEAN["int8"]()
    options = QuantizeOptions("int8", "tensorrt")
    job: Any = SimpleNamespace(
        name="encoder", precision="int8", out=tmp_path / "model.onnx", record="before", options=options
    )
    written = [clean, model]
    monkeypatch.setattr(stages, "_write", lambda job: ir.save(written.pop(0), job.out))
    quantize_stage(job)
    with pytest.raises(CheckFailed, match=rf"stage encoder: error float16-norm at {node}: .*\(\d+ errors in all\)"):
        quantize_stage(job)


def test_every_rule_has_a_plant() -> None:
    assert list(PLANTS) == [rule.name for rule in RULES]
    assert len({rule.name for rule in RULES}) == len(RULES)


CLEAN: dict[str, Callable[[], tuple[ir.Model, str]]] = {
    "float": lambda: (block_model(mask=True), "fp32"),
    "int8": lambda: (quantized(block_model(mask=True)), "int8"),
    "int8 without attention": lambda: (quantized(block_model(tokens=600)), "int8"),
    "fp8": lambda: (quantized(block_model(mask=True), "fp8"), "fp8"),
    "int4 in blocks": lambda: (blocked_linear(), "int4"),
    "int4 in blocks along the last axis": lambda: (blocked_linear(2, axis=1), "int4"),
    "fp16 around islands": lambda: (to_float16(block_model(), "Gelu"), "fp16"),
}


@pytest.mark.parametrize("name", CLEAN)
def test_clean_graphs(name: str) -> None:
    model, precision = CLEAN[name]()
    assert [one.as_text() for one in check_rules(model, precision=precision)] == []


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (lambda: blocked_linear(8, axis=0), None),
        (lambda: _with_scales((3, 4)), "scales of shape [3, 4] for [16, 4] in blocks of 8, not [2, 4]"),
    ],
)
def test_blocks(model: Callable[[], ir.Model], problem: str | None) -> None:
    found = [one.why for one in check_rules(model(), precision="int4")]
    assert len(found) == (problem is not None)
    if problem is not None:
        assert problem in found[0]


def _with_scales(shape: tuple[int, int]) -> ir.Model:
    model = blocked_linear()
    rewire(model, "w.dq", 1, np.full(shape, 0.1, np.float32))
    return model


@pytest.mark.parametrize(("square", "found"), [("Pow", ["float16-norm"]), ("Mul", ["float16-norm"]), (None, [])])
def test_written_out_norms_in_float16(square: str | None, found: list[str]) -> None:
    """The mean of squares belongs to a norm; the mean of features is a pooling, which FP16 can hold."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(["batch", 8]))
    nodes = []
    if square == "Pow":
        nodes.append(ir.node("Pow", [x, weight("two", np.array(2, np.float16))], name="square"))
    elif square == "Mul":
        nodes.append(ir.node("Mul", [x, x], name="square"))
    source = nodes[-1].outputs[0] if nodes else x
    nodes.append(ir.node("ReduceMean", [source, weight("axes", np.array([-1]))], name="mean"))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT16), ir.Shape(["batch", 1])
    model = make_model([x], [y], nodes)
    assert [one.rule for one in check_rules(model, precision="fp16")] == found


def test_weight_only_int8_is_said_so() -> None:
    """Weights in INT8 and activations in float: half-quantised, unless that is what is meant."""
    model = quantized(block_model())
    fc1 = node_of(model, "fc1")
    fc1.replace_input_with(0, node_of(model, "norm2").outputs[0])
    RemoveUnusedNodesPass()(model)
    assert [(one.rule, one.node) for one in check_rules(model, precision="int8")] == [("half-quantized", "fc1")]
    assert check_rules(model, precision="int8", weight_only=True) == ()


def test_both_halves_of_a_pair_are_looked_at() -> None:
    model, precision, _ = PLANTS["unpaired"]()
    found = {one.node: one.why for one in check_rules(model, precision=precision) if one.rule == "unpaired"}
    assert "nothing reads its result" in found["gelu.out/QuantizeLinear"]
    assert "dequantises the result of an input of the graph" in found["gelu.out/DequantizeLinear"]


def test_by_path_and_without_the_weights(tmp_path: Path) -> None:
    """A file is read, its weights are not: a graph of more than 2 GB costs no more than another."""
    path = tmp_path / "model.onnx"
    ir.save(quantized(block_model()), path, external_data="model.onnx.data", size_threshold_bytes=1000)
    (tmp_path / "model.onnx.data").unlink()
    assert check_rules(path, precision="int8") == ()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision int2 has no rules"):
        check_rules(block_model(), precision="int2")
    with pytest.raises(InputError, match=r"gone\.onnx is not read as an ONNX model"):
        check_rules(tmp_path / "gone.onnx", precision="int8")
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(b"\xff\xff\xff")
    with pytest.raises(InputError, match=r"wrong\.onnx is not read as an ONNX model"):
        check_rules(wrong, precision="int8")


class _Reader:
    """What onnxruntime.quantization reads its calibration data from."""

    def __init__(self, feeds: dict[str, Any]) -> None:
        self._samples: Iterator[dict[str, Any]] = iter([feeds])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._samples, None)


def _quantize_static(tmp_path: Path, **options: Any) -> Counter[tuple[str, str]]:
    """Violations in what onnxruntime.quantization makes of the block, by severity and rule."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(_Reader, CalibrationDataReader):  # type: ignore[misc]
        pass

    source, out = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    model = block_model(mask=True)
    ir.save(model, source)
    logging.disable(logging.WARNING)  # it asks for a preprocessing step that is of no use here
    try:
        quantize_static(source, out, Reader(block_inputs(model)), **options)
    finally:
        logging.disable(logging.NOTSET)
    return Counter((one.severity, one.rule) for one in check_rules(out, precision="int8"))


def test_onnxruntime_defaults_break_the_rules(tmp_path: Path) -> None:
    found = _quantize_static(tmp_path)
    assert {rule for severity, rule in found if severity == "error"} == {
        "zero-point",
        "bias-int32",
        "scalar",
        "quantized-norm",
        "quantized-softmax",
        "quantized-mask-add",
        "quantized-activation",
    }
    assert {rule for severity, rule in found if severity == "warning"} == {"weight-per-channel", "needless-pair"}
    assert found["error", "zero-point"] > 40


PRODUCTS = ["MatMul", "Gemm", "Conv"]


@pytest.mark.parametrize("stored", [True, False])
def test_onnxruntime_recipe_for_tensorrt_is_clean(tmp_path: Path, stored: bool) -> None:
    found = _quantize_static(
        tmp_path,
        op_types_to_quantize=PRODUCTS,
        nodes_to_exclude=["scores", "mix"],
        per_channel=True,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "AddQDQPairToWeight": not stored,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": PRODUCTS,
            "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
        },
    )
    assert found == ({} if stored else {("warning", "weight-stored-float"): 6})
