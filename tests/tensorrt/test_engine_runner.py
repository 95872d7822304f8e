"""The TensorRT engine class over the doubles: order, profiles, shapes, graphs, memory, arrays left on the device."""

from __future__ import annotations

import ctypes
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from tests.tensorrt.cuda_double import COMPUTE_MS, COPY_MS, CudaError
from tests.tensorrt.engines import Doubles, install_doubles, make_stage
from tests.tensorrt.listing import VERSIONS
from tests.tensorrt.small_model import LATER_PROFILE, PROFILE, WEIGHT, write_model, write_small_model

from bridgeport.errors import EngineError
from bridgeport.runtime.tensorrt.device import DeviceArray
from bridgeport.runtime.tensorrt.latency import Stopwatch, as_text, summarise

PROFILES = (PROFILE, LATER_PROFILE)  # 1 to 4 rows, 5 to 8 rows


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Doubles:
    return install_doubles(monkeypatch, tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_small_model(tmp_path)


def rows(count: int, scale: float = 1.0) -> Any:
    return scale * np.arange(count * 3, dtype=np.float32).reshape(count, 3)


def context_calls(doubles: Doubles) -> list[str]:
    """What the context was told since the last time, inference of shapes apart."""
    names = [name.partition(".")[2] for name in doubles.tensorrt.names() if name.startswith("IExecutionContext.")]
    doubles.tensorrt.calls.clear()
    return [name for name in names if name not in ("infer_shapes", "get_tensor_shape")]


@pytest.mark.parametrize("version", VERSIONS)
def test_outputs_and_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, version: str) -> None:
    doubles = install_doubles(monkeypatch, tmp_path, version)
    with make_stage(doubles.api, model, PROFILES) as engine:
        for count in (2, 2, 2, 4, 6, 1, 1, 1):  # within a profile, to the other and back
            x = rows(count, 0.5)
            np.testing.assert_array_equal(engine.run({"x": x})["y"], x @ WEIGHT)
    doubles.tensorrt.check_order()
    assert doubles.cuda.left() == {}, "closing frees all"


def test_only_what_changed_is_set_again(doubles: Doubles, model: Path) -> None:
    with make_stage(doubles.api, model, PROFILES, graphs=False) as engine:
        context_calls(doubles)
        engine.run({"x": rows(4)})
        first = ["set_optimization_profile_async", "set_input_shape", "set_tensor_address", "set_tensor_address"]
        assert context_calls(doubles) == [*first, "execute_async_v3"]
        engine.run({"x": rows(4, 2)})
        assert context_calls(doubles) == ["execute_async_v3"]
        engine.run({"x": rows(2)})
        assert context_calls(doubles) == ["set_input_shape", "execute_async_v3"], "the larger buffers serve"


def test_the_profile_that_takes_the_shapes(doubles: Doubles, model: Path) -> None:
    with make_stage(doubles.api, model, PROFILES) as engine:
        for count in (1, 4, 5, 8, 4):
            engine.run({"x": rows(count)})
    switched = doubles.tensorrt.of("IExecutionContext.set_optimization_profile_async")
    assert [call.arguments["profile_index"] for call in switched] == [0, 1, 0]
    streams = {call.arguments["stream_handle"] for call in switched}
    assert len(streams) == 1
    assert 0 not in streams, "never the default stream"


def test_a_shape_between_profiles_names_axis_and_ranges(doubles: Doubles, model: Path) -> None:
    apart = ({"x": ((1, 3), (1, 3), (2, 3))}, {"x": ((6, 3), (6, 3), (8, 3))})
    with make_stage(doubles.api, model, apart) as engine:
        why = (
            r"encoder: axis 'batch' of x is 4, profile '0' takes 1 to 2; .* is 4, profile '1' takes 6 to 8; .*--profile"
        )
        with pytest.raises(EngineError, match=why):
            engine.run({"x": rows(4)})
        np.testing.assert_array_equal(engine.run({"x": rows(2)})["y"], rows(2) @ WEIGHT)


def test_graph_once_per_shape(doubles: Doubles, model: Path) -> None:
    with make_stage(doubles.api, model, PROFILES) as engine:
        for run in range(5):
            np.testing.assert_array_equal(engine.run({"x": rows(2, run)})["y"], rows(2, run) @ WEIGHT)
            assert engine.replays == (run >= 1)
        assert doubles.cuda.calls.count("cudaStreamBeginCapture") == 1
        assert doubles.cuda.calls.count("cudaGraphLaunch") == 4
        assert len(doubles.tensorrt.of("IExecutionContext.execute_async_v3")) == 2, "one normal run, one captured"
        engine.run({"x": rows(3)})
        assert not engine.replays
        assert doubles.cuda.graphs == {}, "another shape drops it"
        for run in range(2):
            np.testing.assert_array_equal(engine.run({"x": rows(2, run)})["y"], rows(2, run) @ WEIGHT)
        assert doubles.cuda.calls.count("cudaStreamBeginCapture") == 2


def test_no_graph_for_what_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    doubles = install_doubles(monkeypatch, tmp_path, refuse_capture=True)
    with caplog.at_level("INFO"), make_stage(doubles.api, model, PROFILES) as engine:
        for run in range(4):
            np.testing.assert_array_equal(engine.run({"x": rows(2, run)})["y"], rows(2, run) @ WEIGHT)
    assert doubles.cuda.calls.count("cudaStreamBeginCapture") == 1, "tried once"
    assert doubles.cuda.last == CudaError.cudaSuccess, "TensorRT would take it for an error of its next kernel"
    assert "encoder runs without a CUDA graph: CUDA: cudaStreamEndCapture failed" in caplog.text


def test_no_graph_with_weight_streaming(doubles: Doubles, model: Path) -> None:
    with make_stage(doubles.api, model, PROFILES, "WEIGHT_STREAMING") as engine:
        for _ in range(3):
            engine.run({"x": rows(2)})
    assert "cudaStreamBeginCapture" not in doubles.cuda.calls


def test_an_output_whose_size_depends_on_data(doubles: Doubles, tmp_path: Path) -> None:
    """Indices of the elements that are not zero, [2, n]: only for as many as rows does the contract's shape hold."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["at"]),
        helper.make_node("Transpose", ["at"], ["turned"], perm=[1, 0]),
        helper.make_node("Cast", ["turned"], ["y"], to=1),
    ]
    with make_stage(doubles.api, write_model(tmp_path / "some.onnx", nodes, rows="found"), (PROFILE,)) as engine:
        x = np.zeros((2, 3), np.float32)
        x[0, 2] = x[1, 1] = 1
        for _ in range(3):
            np.testing.assert_array_equal(engine.run({"x": x})["y"], [[0, 2], [1, 1]])
        assert "cudaStreamBeginCapture" not in doubles.cuda.calls
        with pytest.raises(EngineError, match=r"y came to \[6, 2\], the contract says \[2, 2\]"):
            engine.run({"x": np.ones((2, 3), np.float32)})


def test_arrays_stay_on_the_device(doubles: Doubles, model: Path) -> None:
    with make_stage(doubles.api, model, PROFILES) as engine:
        doubles.cuda.copies.clear()
        first, second = (engine.run({"x": rows(2, scale)}, resident=True)["y"] for scale in (1, 2))
        assert [way for way, _ in doubles.cuda.copies] == ["HostToDevice", "HostToDevice"]
        np.testing.assert_array_equal(np.asarray(first), rows(2) @ WEIGHT)
        np.testing.assert_array_equal(np.asarray(second[1:]), (rows(2, 2) @ WEIGHT)[1:])
        device: Any = engine.memory
        held: Any = device.empty((4, 3), "float32")
        engine_input = rows(4)
        doubles.cuda.run()
        _write(held, engine_input)
        doubles.cuda.copies.clear()
        found = engine.run({"x": held[1:3]})["y"]
        assert [way for way, _ in doubles.cuda.copies] == ["DeviceToHost"]
        np.testing.assert_array_equal(found, engine_input[1:3] @ WEIGHT)


def _write(array: DeviceArray, values: Any) -> None:
    ctypes.memmove(array.address, values.ctypes.data, values.nbytes)


def test_rows_are_gathered_without_the_host(doubles: Doubles, model: Path) -> None:
    with make_stage(doubles.api, model, PROFILES) as engine:
        device: Any = engine.memory
        source = device.empty((6, 2), "float32")
        values = np.arange(12, dtype=np.float32).reshape(6, 2)
        _write(source, values)
        doubles.cuda.copies.clear()
        order = np.array([0, 1, 2, 5, 4, 0])
        np.testing.assert_array_equal(np.asarray(device.take(source, order)), values[order])
        assert [size for way, size in doubles.cuda.copies if way == "DeviceToDevice"] == [24, 8, 8, 8]
        assert device.take(source, np.arange(6)) is source
        target = device.empty((8, 2), "float32")
        _write(target, np.zeros((8, 2), np.float32))
        device.put(target, np.array([1, 2, 6]), source[1:4])
        expected = np.zeros((8, 2), np.float32)
        expected[[1, 2, 6]] = values[1:4]
        np.testing.assert_array_equal(np.asarray(target), expected)
        doubles.cuda.copies.clear()
        assert device.concatenate([source[:2], source[2:5]]).address == source.address
        assert doubles.cuda.copies == [], "neighbours are joined where they lie"
        parts = [source[4:], source[:1]]
        np.testing.assert_array_equal(np.asarray(device.concatenate(parts)), values[[4, 5, 0]])
        np.testing.assert_array_equal(np.asarray(source.reshape(3, -1)[1]), values[2:4].reshape(-1))
        with pytest.raises(IndexError, match="no step"):
            source[::2]


def test_an_array_of_another_pipeline(doubles: Doubles, model: Path) -> None:
    with make_stage(doubles.api, model, PROFILES) as one, make_stage(doubles.api, model, PROFILES) as other:
        foreign: Any = one.memory
        with pytest.raises(EngineError, match="another pipeline's device; pass np"):
            other.run({"x": foreign.empty((2, 3), "float32")})


def test_the_device_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    doubles = install_doubles(monkeypatch, tmp_path, limit=300_000)
    with make_stage(doubles.api, model, ({"x": ((1, 3), (2, 3), (4000, 3))},), rows=4000) as engine:
        device: Any = engine.memory
        for size in (20_000, 30_000):
            device.block(size)  # given back at once: kept for later, and freed when another size needs the room
        np.testing.assert_array_equal(engine.run({"x": rows(4000)})["y"], rows(4000) @ WEIGHT)
        with pytest.raises(EngineError, match=r"no 0\.1 MiB left \(.* are free\); .*--weight-streaming"):
            device.block(100_000)


def test_a_plan_of_another_graph(doubles: Doubles, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])])
    text = other.read_bytes().replace(b"\x0a\x01y", b"\x0a\x01z").replace(b"\x12\x01y", b"\x12\x01z")
    other.write_bytes(text)
    with pytest.raises(EngineError, match="output 'y' is missing in the engine and float32 in the manifest"):
        make_stage(doubles.api, other, (PROFILE,))
    assert doubles.cuda.pinned == {}


def test_a_closed_engine(doubles: Doubles, model: Path) -> None:
    engine = make_stage(doubles.api, model, PROFILES)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="encoder: the engine is closed"):
        engine.run({"x": rows(2)})


def test_a_call_and_an_array_of_a_closed_engine(doubles: Doubles, model: Path) -> None:
    """Its stream is gone, and CUDA would take the handle all the same."""
    engine = make_stage(doubles.api, model, PROFILES)
    left = engine.run({"x": rows(2)}, resident=True)["y"]
    call = engine.bind({"x": rows(2)}, {"y": np.zeros((2, 2), np.float32)})
    engine.close()
    doubles.cuda.calls.clear()
    with pytest.raises(EngineError, match="encoder: the engine is closed"):
        call()
    with pytest.raises(EngineError, match=r"is closed; copy arrays with np\.asarray before"):
        np.asarray(left)
    assert doubles.cuda.calls == []
    del left
    assert doubles.cuda.left() == {}


def test_an_engine_whose_outputs_are_larger(doubles: Doubles, tmp_path: Path) -> None:
    """A foreign plan with the right names: it would write beyond the memory that the manifest's shape has."""
    wide = write_model(tmp_path / "wide.onnx", [helper.make_node("Concat", ["x", "x"], ["y"], axis=1)], columns=6)
    with make_stage(doubles.api, wide, (PROFILE,)) as engine:
        for _ in range(2):
            with pytest.raises(EngineError, match=r"y comes to \[2, 6\] in the engine and to \[2, 2\] in the manifest"):
                engine.run({"x": rows(2)})
    assert doubles.tensorrt.of("IExecutionContext.execute_async_v3") == []


def test_a_tensor_in_host_memory_waits_for_the_run_that_reads_it(doubles: Doubles, model: Path) -> None:
    doubles.tensorrt.check_memory = None
    with make_stage(doubles.api, model, PROFILES) as engine:
        engine._context.tensors["x"] = replace(engine._context.tensors["x"], location="host")
        found = [engine.run({"x": rows(2, scale)}, resident=True)["y"] for scale in (1, 2)]
        held: Any = engine.memory.upload(rows(2, 3))
        found.append(engine.run({"x": held}, resident=True)["y"])
        for scale, one in enumerate(found, 1):
            np.testing.assert_array_equal(np.asarray(one), rows(2, scale) @ WEIGHT)


def test_a_device_that_failed_is_closed_without_a_second_error(
    doubles: Doubles, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_stage(doubles.api, model, PROFILES)
    engine.run({"x": rows(2)})
    doubles.cuda.broken = True
    with pytest.raises(EngineError, match="cudaMemcpyAsync failed with cudaErrorIllegalAddress"), engine:
        engine.run({"x": rows(2)})
    assert "not freed: CUDA: cudaStreamSynchronize failed" in caplog.text
    with pytest.raises(EngineError, match="is closed"):
        engine.run({"x": rows(2)})


def test_nothing_is_enqueued_while_a_call_has_the_stream(doubles: Doubles, model: Path) -> None:
    """A copy of another thread would be captured into the call's graph."""
    with make_stage(doubles.api, model, PROFILES) as engine:
        device: Any = engine.memory
        held, target = device.upload(rows(2)), device.empty((4, 3), "float32")
        doubles.cuda.calls.clear()

        def work() -> None:
            device.put(target, np.array([1, 2]), held)
            np.testing.assert_array_equal(np.asarray(device.concatenate([held[1:], held[:1]])), rows(2)[::-1])
            device.upload(rows(2))
            device.synchronize()
            done.append(True)

        done: list[bool] = []
        thread = threading.Thread(target=work)
        with device.lock:
            thread.start()
            thread.join(0.1)
            assert doubles.cuda.calls == []
        thread.join(10)
        assert done


def test_rows_of_another_type_or_width(doubles: Doubles, model: Path) -> None:
    with make_stage(doubles.api, model, PROFILES) as engine:
        device: Any = engine.memory
        target = device.upload(np.zeros((3, 2), np.float16))
        device.put(target, np.array([2, 0]), device.upload(np.array([[1, 2], [3, 4]], np.float32)))
        device.put(target, np.array([1]), np.array([[5, 6]], np.float64))
        np.testing.assert_array_equal(np.asarray(target), np.array([[3, 4], [5, 6], [1, 2]], np.float16))
        with pytest.raises(EngineError, match=r"rows of shape \[3\] came for an array with rows of \[2\]"):
            device.put(target, np.array([1]), np.zeros((1, 3), np.float16))


def test_only_the_device_works_between_the_marks(
    doubles: Doubles, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host's time between two events counts too: copies to page-locked memory, shapes, waits."""
    genuine = Stopwatch.mark
    seen: list[str] = []

    def mark(watch: Stopwatch, place: int) -> None:
        seen.extend([*context_calls(doubles), *doubles.cuda.calls, str(place)])
        genuine(watch, place)
        doubles.cuda.calls.clear()

    monkeypatch.setattr(Stopwatch, "mark", mark)
    with make_stage(doubles.api, model, PROFILES) as engine:
        engine.time_runs()
        for count in (2, 4):
            engine.run({"x": rows(count)})
            run = seen[seen.index("0") :]
            assert run == ["0", "cudaMemcpyAsync", "1", "execute_async_v3", "2", "cudaMemcpyAsync", "3"]
            seen.clear()


def test_latency_by_events(doubles: Doubles, model: Path) -> None:
    with make_stage(doubles.api, model, PROFILES) as engine:
        engine.run({"x": rows(2)})
        engine.time_runs()
        for _ in range(10):
            engine.run({"x": rows(2)})
        runs = engine.latencies()
        assert engine.latencies() == []
    summary = summarise(runs)
    assert {part: summary[part]["p99"] for part in ("h2d", "compute", "d2h")} == {
        "h2d": COPY_MS,
        "compute": COMPUTE_MS,
        "d2h": COPY_MS,
    }
    assert summary["latency"]["p50"] == COMPUTE_MS + 2 * COPY_MS
    assert summary["enqueue"]["min"] > 0
    assert re.search(r"GPU Compute Time: min = 2 ms, .*percentile\(99%\) = 2 ms", as_text(summary))
    assert doubles.cuda.left() == {}


def test_percentiles_are_measured_values() -> None:
    from bridgeport.runtime.tensorrt.latency import Latency

    one = summarise([Latency(0.0, float(value), 0.0, 0.0) for value in range(100, 0, -1)])["compute"]
    assert (one["min"], one["p50"], one["p90"], one["p99"], one["max"], one["mean"]) == (1, 50, 90, 99, 100, 50.5)
    assert summarise([]) == {}
