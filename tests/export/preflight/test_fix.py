"""Repairs: each rewrite alone on a small graph, and whole bundles before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import parser
from tests.export.graphs import run
from tests.export.preflight.stages import planted, without_decoder

from bridgeport.bundle import Bundle
from bridgeport.errors import OutputError
from bridgeport.export.passes import apply_passes
from bridgeport.export.preflight import fix as fixing
from bridgeport.export.preflight.corners import Limits
from bridgeport.export.preflight.findings import Finding
from bridgeport.export.preflight.fix import fix_bundle
from bridgeport.export.preflight.graph import check_graph
from bridgeport.export.preflight.repairs import DoubleToFloat, Float32Islands, LowerMasks, repair_passes
from bridgeport.runtime.tensorrt.versions import Version

OPTIONS: dict[str, Any] = {
    "profiles": ["batch=2 sequence=4"],
    "limits": Limits(memory=4 << 30, seconds=600.0),
    "threads": 1,
}


def graph(inputs: str, outputs: str, body: str) -> ir.Model:
    """A model in ONNX's text form, opset 20."""
    text = f'<ir_version: 10, opset_import: ["": 20]>\ng ({inputs}) => ({outputs}) {{ {body} }}'
    return ir.from_proto(parser.parse_model(text))


MASKED = """high = Constant<value_float = 0.0>() low = Constant<value = float[1] {LOW}>()
    mask = Where(keep, high, low) scores = Add(x, mask) y = Softmax<axis = -1>(scores)"""


@pytest.mark.parametrize("low", ["-inf", "-3.4028235e38"])
def test_masks_become_minus_1e4(low: str) -> None:
    model = graph("bool[N, 4] keep, float[N, 4] x", "float[N, 4] y", MASKED.replace("LOW", "0.0"))
    constant = next(node for node in model.graph if node.outputs[0].name == "low")
    constant.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array([float(low)], np.float32)))
    feed = {
        "keep": np.array([[True, True, False, False]] * 2),
        "x": np.arange(8, dtype=np.float32).reshape(2, 4),
    }
    before = run(model, feed)
    model, results = apply_passes(model, repair_passes(), stage="g")
    assert [one.name for one in results if one.changed] == ["lower-masks"]
    np.testing.assert_array_equal(run(model, feed)[0], before[0])
    # A row that is masked as a whole is what -inf breaks.
    feed["keep"][1] = False
    assert np.isfinite(run(model, feed)[0]).all()


def test_a_large_number_that_masks_nothing_stays() -> None:
    model = graph("float[N] x", "float[N] y", "low = Constant<value_float = -1e5>() y = Max(x, low)")
    assert LowerMasks().requires(model) is not None


def test_double_becomes_float() -> None:
    body = """half = Constant<value = double[1] {0.5}>() wide = Cast<to = 11>(x) scaled = Mul(wide, half)
        y = Cast<to = 1>(scaled)"""
    model = graph("float[N] x", "float[N] y", body)
    feed = {"x": np.array([1.0, 3.0], np.float32)}
    model, _ = apply_passes(model, [DoubleToFloat()], stage="g")
    assert ir.DataType.DOUBLE not in {value.dtype for node in model.graph for value in node.outputs}
    np.testing.assert_array_equal(run(model, feed)[0], [0.5, 1.5])
    assert DoubleToFloat().requires(graph("double[N] x", "double[N] y", "y = Neg(x)")) == (
        "x is an input or output of DOUBLE"
    )


def test_a_clip_of_whole_numbers_is_found_and_rewritten(tmp_path: Path) -> None:
    body = "low = Constant<value_int = 0>() high = Constant<value_int = 3>() y = Clip(x, low, high)"
    model = graph("int64[N] x", "int64[N] y", body)
    ir.save(model, tmp_path / "model.onnx")
    found = check_graph(tmp_path / "model.onnx", None, Version.parse("10.3"), stage="g")
    assert [(one.check, one.severity, one.fixable) for one in found] == [("operator-dtype", "warning", True)]
    model, results = apply_passes(model, repair_passes(), stage="g")
    assert [one.name for one in results if one.changed] == ["whole-number-clip"]
    np.testing.assert_array_equal(run(model, {"x": np.arange(-2, 6)})[0], [0, 0, 0, 1, 2, 3, 3, 3])
    ir.save(model, tmp_path / "model.onnx")
    assert check_graph(tmp_path / "model.onnx", None, Version.parse("10.3"), stage="g") == []


def test_norm_and_softmax_leave_fp16() -> None:
    body = """wide = Constant<value_floats = [1.0, 1.0, 1.0, 1.0]>() gain = Cast<to = 10>(wide)
        n = LayerNormalization<axis = -1>(x, gain) s = Softmax<axis = -1>(n) y = Identity(n)"""
    model = graph("float16[N, 4] x", "float16[N, 4] y, float16[N, 4] s", body)
    # The squares of these are beyond FP16, which is why norms must not compute in it.
    feed = {"x": np.array([[400.0, -400.0, 300.0, -300.0]], np.float16)}
    expected = run(model, feed)
    model, _ = apply_passes(model, [Float32Islands()], stage="g")
    read = [node.inputs[0] for node in model.graph if node.op_type in ("LayerNormalization", "Softmax")]
    assert [value.dtype for value in read if value is not None] == [ir.DataType.FLOAT] * 2
    assert [value.name for value in model.graph.outputs] == ["y", "s"]
    for old, new in zip(expected, run(model, feed), strict=True):
        assert new.dtype == np.float16
        np.testing.assert_allclose(new, old, atol=2e-3)
    assert Float32Islands().requires(model) is not None


def _mask_of_infinity(model: ir.Model) -> None:
    """The scores of the first attention get a mask of -inf that leaves nothing out but one place of each row."""
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    scores = softmax.inputs[0]
    assert scores is not None
    assert scores.shape is not None
    places = scores.shape[-1]
    assert isinstance(places, int)
    mask = np.zeros(places, np.float32)
    mask[-1] = -np.inf
    value = ir.Value(
        name="mask",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(mask.shape),
        const_value=ir.tensor(mask, name="mask"),
    )
    model.graph.register_initializer(value)
    add = ir.node("Add", [scores, value], name="masking")
    add.outputs[0].name, add.outputs[0].type, add.outputs[0].shape = "masked", scores.type, scores.shape
    model.graph.insert_before(softmax, [add])
    softmax.replace_input_with(0, add.outputs[0])


@pytest.fixture(scope="module")
def broken(blip2_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of ONNX Runtime's operators and an encoder with a mask of -inf."""
    return planted(blip2_bundle("llama"), tmp_path_factory.mktemp("broken") / "bundle", "encoder", _mask_of_infinity)


def test_a_bundle_is_repaired(broken: Path, tmp_path: Path) -> None:
    out = tmp_path / "fixed"
    report = fix_bundle(broken, out, device="orin-nano", **OPTIONS)
    assert not report.before.passed
    assert {("llm", "contrib"), ("encoder", "mask")} <= {(one.stage, one.check) for one in report.before.findings}
    assert {(one.stage, one.status) for one in report.repairs} == {("encoder", "repaired"), ("llm", "repaired")}
    assert max(one.max_rel or 0.0 for one in report.repairs) < 1e-4
    assert report.after.passed
    assert report.after.memory is not None
    assert [one.unknown for one in report.after.memory.stages] == [0] * 4  # the mask's Range has a length
    assert {("llm", "contrib"), ("encoder", "mask")} <= {(one.stage, one.check) for one in report.solved()}

    fixed = Bundle.load(out)
    assert fixed.manifest.kv_cache is not None
    assert fixed.manifest.kv_cache.shared_buffer is False
    assert fixed.manifest.stage("llm").opset == 20
    assert (Bundle.load(broken).manifest.target, fixed.manifest.target) == ("cpu", "tensorrt")
    # The variant of the connector still finds its weights, and nothing of the work is left.
    assert fixed.graph("connector", "attention").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["fixed"]


def test_a_repair_that_changes_the_numbers_is_not_kept(
    blip2_bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-1e4 is what keeps the masked place at 0; with a mask of 0 it takes part."""
    vision = without_decoder(blip2_bundle("llama"), tmp_path / "vision")
    broken = planted(vision, tmp_path / "broken", "encoder", _mask_of_infinity)
    monkeypatch.setattr("bridgeport.export.preflight.repairs.MASK", 0.0)
    report = fix_bundle(broken, tmp_path / "fixed", **OPTIONS)
    (encoder,) = report.repairs
    assert (encoder.stage, encoder.status) == ("encoder", "declined")
    assert "RMS" in encoder.note
    left = {(one.stage, one.check) for one in report.after.findings}
    assert {("encoder", "mask"), ("encoder", "fix")} <= left
    old, new = (Bundle.load(path).graph("encoder").read_bytes() for path in (broken, tmp_path / "fixed"))
    assert old == new


def test_output_is_whole_or_not_at_all(
    blip2_bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(blip2_bundle("llama"))
    with pytest.raises(OutputError, match="never replaced"):
        fix_bundle(bundle, bundle.path, force=True, **OPTIONS)

    def found(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(findings=[Finding("contrib", "error", "llm", "node", "why", "fix", fixable=True)])

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fixing, "preflight", found)
    monkeypatch.setattr(fixing, "write_standard_decoder", stop)
    with pytest.raises(KeyboardInterrupt):
        fix_bundle(bundle, tmp_path / "fixed", **OPTIONS)
    assert list(tmp_path.iterdir()) == []
