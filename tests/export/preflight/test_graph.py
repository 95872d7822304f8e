"""Preflight of one graph: every planted problem found, per version, and nothing on clean graphs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from tests.export.preflight.plants import OPERATOR_PLANTS, VERSIONS, Plant, unary
from tests.export.preflight.plants_values import VALUE_PLANTS

from bridgeport.bundle import Bundle
from bridgeport.errors import InputError
from bridgeport.export.preflight import Finding, check_graph, sort_findings
from bridgeport.models.contract import Axis, StageContract, TensorSpec
from bridgeport.runtime.tensorrt.versions import Version

PLANTS = OPERATOR_PLANTS | VALUE_PLANTS


def check(path: Path, version: str = "10.3", contract: StageContract | None = None) -> list[Finding]:
    return check_graph(path, contract, Version.parse(version), stage="encoder")


def write(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", PLANTS)
def test_plant_is_found(name: str, version: str, tmp_path: Path) -> None:
    plant = PLANTS[name]
    found = check(write(plant.model(), tmp_path), version)
    mine = [one for one in found if one.check == plant.check]
    expected = plant.expected(version)
    if expected is None:
        assert not [one for one in mine if plant.word in one.why], mine
        return
    assert mine, found
    assert mine[0].severity == expected, mine
    assert plant.word in mine[0].why, mine
    assert mine[0].fix
    assert mine[0].stage == "encoder"
    assert any(one.fixable for one in mine) == plant.fixable
    others = {one.check for one in found if one.severity != "note"} - {plant.check} - plant.also
    assert not others, [one for one in found if one.check in others]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("stage", ["encoder", "connector"])
def test_nothing_on_clean_graphs(small_bundle: Path, stage: str, version: str) -> None:
    bundle = Bundle.load(small_bundle)
    found = check(bundle.graph(stage), version, bundle.manifest.stage(stage).contract)
    assert [one for one in found if one.severity != "note"] == []


def test_decoder_of_the_model_builder(small_bundle: Path) -> None:
    """The graph of onnxruntime-genai's model builder: each contributed operator, once, with what to do."""
    found = check(Bundle.load(small_bundle).path / "llm" / "decoder.onnx", "11.4")
    contributed = {one.why.split(":")[0]: one for one in found if one.check == "contrib"}
    assert set(contributed) == {
        "com.microsoft.GroupQueryAttention",
        "com.microsoft.SkipSimplifiedLayerNormalization",
    }
    assert all("--target tensorrt" in one.fix for one in contributed.values())
    assert any(one.check == "operator" and "SimplifiedLayerNormalization" in one.why for one in found)


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_on_the_standard_decoder(small_bundle: Path, tmp_path: Path, version: str) -> None:
    """The rewritten decoder, which is what the contributed one is answered with."""
    from bridgeport.export.passes.standard_decoder import write_standard_decoder

    write_standard_decoder(Bundle.load(small_bundle).graph("llm"), tmp_path / "decoder.onnx")
    assert [one for one in check(tmp_path / "decoder.onnx", version) if one.severity != "note"] == []


_HARMLESS = {
    "mask of -1e4": "g (float16[N, 8] x, bool[N, 8] b) => (float16[N, 8] y) <float m = {-10000.0}, float o = {0.0}>"
    " { w = Where(b, o, m) f = Cast<to=1>(x) a = Add(f, w) p = Softmax(a) y = Cast<to=10>(p) }",
    "bounds of Clip": "g (float[N] x) => (float[N] y) <float a = {-inf}, float b = {3e38}> { y = Clip(x, a, b) }",
    "UINT8 that is cast": "g (uint8[N] x) => (float[N] y) { y = Cast<to=1>(x) }",
    "loop of known length": "g (float[2] x) => (float[2] y, float[4, 2] z) <int64 n = {4}, bool t = {1}>"
    " { y, z = Loop<body = b (int64 i, bool c, float[2] s) => (bool c2, float[2] s2, float[2] z1)"
    " { c2 = Identity(c) s2 = Add(s, s) z1 = Identity(s2) }>(n, t, x) }",
    "sizes of shapes": "g (float[N, 8] x) => (float[M] y) <int64 a = {0}, int64[1] m = {-1}>"
    " { s = Shape(x) n = Gather(s, a) y = Reshape(x, m) }",
}


@pytest.mark.parametrize("name", _HARMLESS)
def test_harmless(name: str, tmp_path: Path) -> None:
    found = check(write(Plant(_HARMLESS[name], "", None, "").model(), tmp_path))
    assert [one for one in found if one.severity != "note"] == []


def test_large_constant_that_stays_in_fp32(tmp_path: Path) -> None:
    """A graph in FP16 with one product kept in FP32: a warning, where its cast to FP16 is an error."""
    graph = (
        "g (float16[N] x) => (float16[N] y) <float w = {70000.0}>"
        " { h = Add(x, x) f = Cast<to=1>(h) m = Div(f, w) y = Cast<to=10>(m) }"
    )
    found = check(write(Plant(graph, "", None, "").model(), tmp_path))
    assert [(one.check, one.severity) for one in found] == [("constant", "warning")]


def test_equal_findings_are_one(tmp_path: Path) -> None:
    plant = Plant("g (float[2, 2] x) => (float y) { a = Det(x) b = Det(x) c = Det(x) y = Sum(a, b, c) }", "", None, "")
    found = check(write(plant.model(), tmp_path))
    assert [(one.check, one.node) for one in found] == [("operator", "a and 2 more")]


def test_opset_of_four_bit_weights(tmp_path: Path) -> None:
    """INT4 is a type of 10.3, and ONNX has it from opset 21 only."""
    graph = (
        "g (float[N, 4] x) => (float[N, 2] y) <int4[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 0}, float[2, 2] s = {1, 1, 1, 1}>"
        " { d = DequantizeLinear<axis=0, block_size=2>(w, s) y = MatMul(x, d) }"
    )
    found = check(write(Plant(graph, "", None, "", 21).model(), tmp_path))
    assert [one for one in found if one.severity == "error"] == []
    later = check(write(Plant(graph, "", None, "", 22).model(), tmp_path))
    assert [one.check for one in later if one.severity == "error"] == ["opset"]


def test_problem_in_a_subgraph(tmp_path: Path) -> None:
    graph = (
        "g (bool c, float[2, 2] x) => (float y) { y = If<then_branch = a () => (float p) { p = Det(x) },"
        " else_branch = b () => (float q) { q = ReduceSum<keepdims=0>(x) }>(c) }"
    )
    found = check(write(Plant(graph, "", None, "").model(), tmp_path))
    assert [(one.check, one.node) for one in found if one.severity == "error"] == [("operator", "p")]


def external(path: Path, *, dtype: int = onnx.TensorProto.FLOAT, shape: tuple[int, int] = (2, 4)) -> onnx.ModelProto:
    """Write a model whose one weight lies in `weights.bin`, which is not written."""
    length = math.prod(shape) * (4 if dtype == onnx.TensorProto.FLOAT else 1)
    tensor = onnx.TensorProto(name="w", data_type=dtype, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": "weights.bin", "offset": "0", "length": str(length)}.items():
        tensor.external_data.add(key=key, value=value)
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [shape[0], 1])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)
    initializers, nodes = [tensor], [helper.make_node("Mul", ["x", "w"], ["y"])]
    if dtype != onnx.TensorProto.FLOAT:
        initializers.append(numpy_helper.from_array(np.array(0.5, np.float32), "s"))
        nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), helper.make_node("Mul", ["x", "d"], ["y"])]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return model


def test_missing_and_short_external_data(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    external(path)
    (missing,) = check(path)
    assert (missing.check, missing.severity, missing.node) == ("external-data", "error", "w")
    assert "missing" in missing.why
    (tmp_path / "weights.bin").write_bytes(bytes(20))
    (short,) = check(path)
    assert "shorter" in short.why
    (tmp_path / "weights.bin").write_bytes(np.full(8, 7e4, np.float32).tobytes())
    (large,) = check(path)
    assert (large.check, large.severity) == ("constant", "warning")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname"])
def test_external_data_outside(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(32))
    model = external(folder / "model.onnx")
    model.graph.initializer[0].external_data[0].value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (found,) = check(folder / "model.onnx")
    assert (found.check, found.severity) == ("external-data", "error")
    assert "outside" in found.why


def test_weights_over_two_gigabytes(tmp_path: Path) -> None:
    """Three GB of INT8 in a file without content: not read by anything, and noted."""
    path = tmp_path / "model.onnx"
    external(path, dtype=onnx.TensorProto.INT8, shape=(30_000, 100_000))
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(3 * 10**9)
    found = [one for one in check(path) if one.check == "external-data"]
    assert [(one.severity, one.node) for one in found] == [("note", "model.onnx")]
    assert "3.00 GB" in found[0].why


def test_protobuf_over_two_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)
    (found,) = check(path)
    assert (found.check, found.severity) == ("size", "error")


def test_contract(tmp_path: Path) -> None:
    path = write(Plant(unary("Relu(x)", shape="N, 8"), "", None, "").model(), tmp_path)
    spec = TensorSpec(name="x", dtype="float16", shape=("batch", 8))
    other = TensorSpec(name="z", dtype="float32", shape=("batch", 8))
    axes = (Axis(name="batch", min=1, opt=1, max=4),)
    found = check(path, contract=StageContract(name="encoder", inputs=(spec,), outputs=(other,), axes=axes))
    assert [(one.check, one.severity, one.node) for one in found] == [
        ("contract", "error", "x"),
        ("contract", "error", "z"),
    ]
    assert "float16" in found[0].why
    assert "['y']" in found[1].why


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file"):
        check(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no protobuf at all")
    with pytest.raises(InputError, match="not read as an ONNX model"):
        check(tmp_path / "text.onnx")
    path = write(PLANTS["double"].model(), tmp_path)
    with pytest.raises(InputError, match=r"8\.6 is older than 10\.3"):
        check(path, "8.6")


def test_version_beyond_the_tables(tmp_path: Path) -> None:
    """A later version may take more: what an older one refuses is a warning."""
    found = check(write(Plant(unary("Relu(x)"), "", None, "", 26).model(), tmp_path), "12.1")
    assert {(one.check, one.severity) for one in found} == {("version", "note"), ("opset", "warning")}


@pytest.mark.parametrize("place", [0, 300, 511])
def test_weight_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """A large number is found in whichever piece it is, and the file is not mapped."""
    from bridgeport.export.preflight import constants
    from bridgeport.export.preflight.subject import Subject

    monkeypatch.setattr(constants, "_PIECE", 100)
    path = tmp_path / "model.onnx"
    external(path, shape=(32, 16))
    numbers = np.zeros(512, np.float32)
    numbers[place] = -7e4
    (tmp_path / "weights.bin").write_bytes(numbers.tobytes())
    model = ir.load(path)
    (found,) = constants.check_constants(Subject(path, model, "encoder", Version(10, 3)))
    assert "-70000" in found.why
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None


def test_order() -> None:
    made = [Finding(check, severity, "s", "n", "w", "f") for check, severity in (("b", "note"), ("c", "error"))]  # type: ignore[arg-type]
    made.append(Finding("a", "warning", "s", "n", "w", "f"))
    assert [one.severity for one in sort_findings(made)] == ["error", "warning", "note"]
    assert made[0].to_json()["fixable"] is False
