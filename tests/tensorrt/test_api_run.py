"""The run side of the adapter over the double, at each version: from an ONNX file to numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.tensorrt.double import install_double
from tests.tensorrt.listing import VERSIONS
from tests.tensorrt.small_model import LATER_PROFILE, PROFILE, WEIGHT, build, run, write_model, write_small_model

from bridgeport.errors import EngineError
from bridgeport.runtime.tensorrt.api import TensorInfo, load_api


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_small_model(tmp_path)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_becomes_numbers(monkeypatch: pytest.MonkeyPatch, model: Path, version: str) -> None:
    double = install_double(monkeypatch, version)
    api = load_api()
    engine = api.deserialize(api.create_runtime(), build(api, model, profiles=(PROFILE, LATER_PROFILE)))

    assert str(api.version).startswith(version)
    assert api.tensors(engine) == [
        TensorInfo("x", "input", "float32", (-1, 3)),
        TensorInfo("y", "output", "float32", (-1, 2)),
    ]
    assert api.num_profiles(engine) == 2
    assert api.profile_shapes(engine, "x", 1) == ((5, 3), (6, 3), (8, 3))
    for rows, profile, strategy in ((1, 0, "STATIC"), (4, 0, "USER_MANAGED"), (8, 1, "STATIC")):
        x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
        np.testing.assert_array_equal(run(api, engine, x, profile, strategy), x @ WEIGHT)
    double.check_order()
    strongly_typed = 1 << (0 if version == "11.4" else 1)  # renumbered: why the adapter asks by name
    assert double.of("Builder.create_network")[0].arguments == {"flags": strongly_typed}


@pytest.mark.parametrize(
    ("shape", "why"), [((5, 3), r"axis 0 .*\[1\]\.\.\[4\]"), ((2, 4), "axis 1"), ((2,), "rank 2, 1 came")]
)
def test_a_shape_outside_the_profile(
    monkeypatch: pytest.MonkeyPatch, model: Path, shape: tuple[int, ...], why: str
) -> None:
    install_double(monkeypatch)
    api = load_api()
    context = api.create_context(api.deserialize(api.create_runtime(), build(api, model)))
    with pytest.raises(EngineError, match=why):
        api.set_input_shape(context, "x", shape)


def test_what_is_missing_at_enqueue(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    install_double(monkeypatch)
    api = load_api()
    engine = api.deserialize(api.create_runtime(), build(api, model))
    x = np.ones((2, 3), np.float32)
    context = api.create_context(engine, "USER_MANAGED")
    with pytest.raises(EngineError, match="x has no shape"):
        api.execute(context, 7)
    api.set_input_shape(context, "x", x.shape)
    with pytest.raises(EngineError, match="no address is set for x"):
        api.execute(context, 7)
    api.set_address(context, "x", x.ctypes.data)
    api.set_address(context, "y", np.zeros((2, 2), np.float32).ctypes.data)
    with pytest.raises(EngineError, match="device memory is not set"):
        api.execute(context, 7)
    with pytest.raises(EngineError, match="not an input or output"):
        api.set_address(context, "z", 1)
    with pytest.raises(EngineError, match="1 is no profile"):
        api.set_profile(context, 1, 7)


def test_shapes_that_contradict_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each inside of its profile, and no output shape for the two: the binding raises RuntimeError there."""
    shapes = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("x", "z", "y")}
    node = helper.make_node("Add", ["x", "z"], ["y"])
    graph = helper.make_graph([node], "sum", [shapes["x"], shapes["z"]], [shapes["y"]])
    path = tmp_path / "sum.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    install_double(monkeypatch)
    api = load_api()
    profiles = ({"x": PROFILE["x"], "z": PROFILE["x"]},)
    context = api.create_context(api.deserialize(api.create_runtime(), build(api, path, profiles=profiles)))
    api.set_input_shape(context, "x", (2, 3))
    assert api.infer_shapes(context) == ["z"]
    api.set_input_shape(context, "z", (4, 3))
    with pytest.raises(EngineError, match=r"output shapes are not known: .*z: batch is 4, and 2 elsewhere; the shapes"):
        api.infer_shapes(context)


def test_outputs_whose_size_depends_on_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Memory:
        def allocate(self, name: str, address: int, size: int, alignment: int, stream: int) -> int:
            self.array = np.zeros(size, np.uint8)
            return self.array.ctypes.data

        def notify_shape(self, name: str, shape: tuple[int, ...]) -> None:
            self.shape = shape

    nodes = [
        helper.make_node("NonZero", ["x"], ["at"]),
        helper.make_node("Cast", ["at"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["y"]),
    ]
    install_double(monkeypatch)
    api = load_api()
    path = write_model(tmp_path / "m.onnx", nodes, rows="found")
    context = api.create_context(api.deserialize(api.create_runtime(), build(api, path)))
    x = np.array([[0, 1, 0], [2, 0, 3]], np.float32)
    api.set_input_shape(context, "x", x.shape)
    assert api.tensor_shape(context, "y") == (-1, 2)
    api.set_address(context, "x", x.ctypes.data)
    memory = Memory()
    keep = api.set_output_memory(context, "y", memory)
    api.execute(context, 7)
    assert keep is not None
    assert memory.array.view(np.float32).reshape(memory.shape).tolist() == [[0, 1], [1, 0], [1, 2]]


@pytest.mark.parametrize("version", VERSIONS)
def test_stripped_plans_are_refitted(monkeypatch: pytest.MonkeyPatch, model: Path, version: str) -> None:
    install_double(monkeypatch, version)
    api = load_api()
    plan = build(api, model, "STRIP_PLAN", "REFIT_IDENTICAL")
    assert WEIGHT.tobytes() not in plan
    runtime = api.create_runtime()
    engine = api.deserialize(runtime, plan)
    x = np.ones((2, 3), np.float32)
    with pytest.raises(EngineError, match="not refitted"):
        run(api, engine, x)
    api.refit(engine, model)
    np.testing.assert_array_equal(run(api, engine, x), x @ WEIGHT)
    whole = api.serialize(engine)
    np.testing.assert_array_equal(run(api, api.deserialize(runtime, whole), x), x @ WEIGHT)
    assert WEIGHT.tobytes() not in api.serialize(engine, weights=False)


def test_weights_that_stream(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    install_double(monkeypatch)
    api = load_api()
    engine = api.deserialize(api.create_runtime(), build(api, model, "WEIGHT_STREAMING"))
    assert api.streamable_weights_size(engine) == WEIGHT.nbytes == api.weights_size(engine)
    assert api.set_weight_streaming_budget(engine) == 12
    assert api.set_weight_streaming_budget(engine, 4) == 4


def test_foreign_plans_are_refused(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    double = install_double(monkeypatch, "10.16")
    api = load_api()
    plan, lean = build(api, model), build(api, model, "VERSION_COMPATIBLE")
    runtime = api.create_runtime()
    for bad in (b"garbage", plan[:-1], plan.replace(b'"sm"', b'"xx"')[:60]):
        with pytest.raises(EngineError, match=r"does not load: .*Serialization"):
            api.deserialize(runtime, bad)
    with pytest.raises(EngineError, match="engineHostCodeAllowed is not set"):
        api.deserialize(runtime, lean)
    double.sm = "9.0"
    with pytest.raises(EngineError, match=r"compute 8\.7, not 9\.0"):
        api.deserialize(runtime, plan)
    install_double(monkeypatch, "11.4")
    newer = load_api()
    with pytest.raises(EngineError, match="Version tag does not match"):
        newer.deserialize(newer.create_runtime(), plan)
    newer.deserialize(newer.create_runtime(engine_host_code_allowed=True), lean)


@pytest.mark.parametrize("version", VERSIONS)
def test_inspector_and_profiler(monkeypatch: pytest.MonkeyPatch, model: Path, version: str) -> None:
    install_double(monkeypatch, version)
    api = load_api()
    engine = api.deserialize(api.create_runtime(), build(api, model))
    assert api.engine_information(engine)["Bindings"] == ["x", "y"]
    assert api.num_layers(engine) == 1
    assert (api.weights_size(engine) is None) == (version == "10.3")
    times: list[str] = []
    context = api.create_context(engine)
    keep = api.set_profiler(context, lambda layer, milliseconds: times.append(layer))
    api.set_profile(context, 0, 7)
    api.set_input_shape(context, "x", (1, 3))
    x, y = np.ones((1, 3), np.float32), np.zeros((1, 2), np.float32)
    api.set_address(context, "x", x.ctypes.data)
    api.set_address(context, "y", y.ctypes.data)
    api.execute(context, 7)
    assert keep is not None
    assert times == ["product"]
    assert api.max_output_size(context, "y") == 8
    assert api.active_profile(context) == 0
    assert api.update_device_memory_size(context) == api.device_memory_size(engine, 0)
