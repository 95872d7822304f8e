"""Observations of real graphs: what is seen, cached, resumed and refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from bridgeport.calibration import cache as cache_module
from bridgeport.calibration.cache import cache_directory, observation_key
from bridgeport.calibration.collect import collect, constant_tensors
from bridgeport.calibration.observers import ObserverSettings
from bridgeport.calibration.records import Observations
from bridgeport.errors import CalibrationError

GRAPH = """
<ir_version: 9, opset_import: ["" : 20]>
small (float[batch, 5, 8] x) => (float[batch, 5, 4] y) <float[batch, 5, 6] h, float[batch, 5, 6] a, int64[3] size>
{
    h = MatMul (x, w1)
    a = Relu (h)
    root = Sqrt (h)
    nothing = Mul (h, zero)
    size = Shape (a)
    y = MatMul (a, w2)
}
"""
WATCH = ("x", "h", "a", "y")
SETTINGS = ObserverSettings(observers=("minmax", "moving-average", "percentile"), rows=8)
Feeds = list[dict[str, NDArray[Any]]]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Two products, weights outside the graph's file."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(GRAPH)
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    weights = {"w1": rng.standard_normal((8, 6)), "w2": rng.standard_normal((6, 4)), "zero": np.zeros(1)}
    for name, value in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    file = tmp_path / "stage" / "model.onnx"
    file.parent.mkdir()
    onnx.save(model, file, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return file


@pytest.fixture
def feeds() -> Feeds:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1 + index % 2, 5, 8), dtype=np.float32)} for index in range(9)]


def run(graph: Path, feeds: Any, **options: Any) -> Observations:
    arguments: dict[str, Any] = {"key": "data", "samples": 9, "settings": SETTINGS, "save_every": 2} | options
    watch = arguments.pop("watch", WATCH)
    return collect(graph, feeds, watch, **arguments)


def assert_same(actual: Observations, expected: Observations) -> None:
    """Bit for bit."""
    assert (actual.key, actual.samples) == (expected.key, expected.samples)
    assert list(actual.tensors) == list(expected.tensors)
    for name, stats in expected.tensors.items():
        other = actual.tensors[name]
        plain, expected_plain = (replace(one, channel_min=None, channel_max=None, rows=None) for one in (other, stats))
        assert plain == expected_plain
        for field in ("channel_min", "channel_max", "rows"):
            np.testing.assert_array_equal(getattr(other, field), getattr(stats, field), strict=True)


def test_values_are_those_of_the_graph(graph: Path, feeds: Feeds) -> None:
    """The watched values by numpy: inputs, inner values and outputs, whatever the batch."""
    weights = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(graph).graph.initializer}
    x = np.concatenate([feed["x"].reshape(-1, 8) for feed in feeds])
    h = x @ weights["w1"]
    expected = {"x": x, "h": h, "a": np.maximum(h, 0), "y": np.maximum(h, 0) @ weights["w2"]}
    observed = run(graph, feeds)
    assert list(observed.tensors) == ["x", "h", "a", "y"]
    for name, value in expected.items():
        stats = observed.tensors[name]
        # Sums of 8 products in float32: 1e-6 of the largest is above their rounding, a swapped value is far off.
        tolerance = {"rtol": 0, "atol": 1e-6 * np.abs(value).max()}
        np.testing.assert_allclose([stats.minimum, stats.maximum], [value.min(), value.max()], **tolerance)
        assert stats.channel_min is not None
        assert stats.channel_max is not None
        assert stats.rows is not None
        np.testing.assert_allclose(stats.channel_max, value.max(axis=0), **tolerance)
        np.testing.assert_allclose(stats.channel_min, value.min(axis=0), **tolerance)
        assert stats.rows.shape == (8, value.shape[-1])
        assert set(stats.ranges) == set(SETTINGS.observers)


def test_each_sample_runs_once_and_no_more_than_asked_for(graph: Path, feeds: Feeds) -> None:
    drawn, seen = [], []

    def count() -> Iterator[dict[str, NDArray[Any]]]:
        for index, feed in enumerate(feeds):
            drawn.append(index)
            yield feed

    run(graph, count(), samples=5, progress=lambda done, total: seen.append((done, total)))
    assert drawn == [0, 1, 2, 3, 4]
    assert seen == [(index, 5) for index in (1, 2, 3, 4, 5)]


def test_the_bundle_is_left_alone(graph: Path, feeds: Feeds, tmp_path: Path) -> None:
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in graph.parent.iterdir()}
    run(graph, feeds, cache=tmp_path / "cache")
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in graph.parent.iterdir()} == before


def test_a_known_result_needs_no_inputs(graph: Path, feeds: Feeds, tmp_path: Path) -> None:
    def never(start: int) -> Iterator[dict[str, NDArray[Any]]]:
        raise AssertionError("the cache was not used")

    first = run(graph, feeds, cache=tmp_path)
    seen: list[tuple[int, int]] = []
    assert_same(run(graph, never, cache=tmp_path, progress=lambda *args: seen.append(args)), first)
    assert seen == [(9, 9)]
    assert [file.name for file in tmp_path.glob("*.npz")] == [f"{first.key}.npz"]


def test_the_key_is_that_of_the_content(graph: Path) -> None:
    def key(**changes: Any) -> str:
        options: dict[str, Any] = {"data": "data", "samples": 9, "watch": WATCH, "settings": SETTINGS} | changes
        return observation_key(graph, **options)

    known = key()
    assert known == key(watch=WATCH[::-1])
    changed = [key(data="other"), key(samples=8), key(watch=("x",)), key(settings=ObserverSettings(rows=9))]
    weights = graph.with_name("model.onnx.data")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    changed.append(key())
    model = onnx.load(graph, load_external_data=False)
    model.graph.node[0].name = "renamed"
    onnx.save(model, graph)
    changed.append(key())
    assert len({known, *changed}) == 7


@pytest.mark.parametrize("state", ["finished", "partial"])
@pytest.mark.parametrize("damage", ["cut", "flip", "other file", "other content"])
def test_a_corrupt_cache_is_dropped_with_a_note(
    graph: Path, feeds: Feeds, tmp_path: Path, damage: str, state: str
) -> None:
    expected = run(graph, feeds)
    folder = tmp_path / "cache"
    if state == "finished":
        run(graph, feeds, cache=folder)
    else:
        with pytest.raises(CalibrationError, match="gave 6"):
            run(graph, feeds[:6], cache=folder)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "other file":
        file.write_bytes(b"not an archive")
    else:
        np.savez(file, meta=np.zeros(3), digest=np.zeros(32, np.uint8))
    notes: list[str] = []
    assert_same(run(graph, feeds, cache=folder, note=notes.append), expected)
    assert len(notes) == 1
    assert f"{file.name} is corrupt" in notes[0]
    assert_same(run(graph, [], cache=folder, note=notes.append), expected)
    assert len(notes) == 1


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(graph: Path, feeds: Feeds, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    notes: list[str] = []
    assert_same(run(graph, feeds, cache=blocked, note=notes.append), run(graph, feeds))
    assert "without a cache" in notes[0]


def test_the_cache_does_not_grow_for_ever(tmp_path: Path) -> None:
    """What was used longest ago goes, what was written just now stays, and so do halves that may still be written."""
    for age, name in enumerate(("new.npz", "middle.npz", "old.npz", "kept.npz", ".a.tmp", ".b.tmp")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / ".b.tmp").touch()
    cache_module.prune_cache(tmp_path, keep=tmp_path / "kept.npz", limit=250)
    assert {file.name for file in tmp_path.iterdir()} == {"new.npz", "kept.npz", ".b.tmp"}


def test_the_cache_has_a_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BRIDGEPORT_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own" / "calibration"
    monkeypatch.delenv("BRIDGEPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "bridgeport" / "calibration"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "bridgeport" / "calibration"


@pytest.mark.parametrize("as_function", [False, True])
def test_an_interrupted_run_goes_on_where_it_was(graph: Path, feeds: Feeds, tmp_path: Path, as_function: bool) -> None:
    """State was saved after 6 of 7 samples; the second run takes the other 3 and ends as one run does."""

    def interrupted() -> Iterator[dict[str, NDArray[Any]]]:
        yield from feeds[:7]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(graph, interrupted(), cache=tmp_path)
    starts: list[int] = []
    done: list[int] = []

    def starting(start: int) -> Feeds:
        starts.append(start)
        return feeds[start:]

    inputs: Any = starting if as_function else feeds
    resumed = run(graph, inputs, cache=tmp_path, progress=lambda *args: done.append(args[0]))
    assert_same(resumed, run(graph, feeds))
    assert done == [7, 8, 9]
    assert starts == ([6] if as_function else [])
    assert len(list(tmp_path.glob("*.npz"))) == 1  # the state is gone


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from bridgeport.calibration.collect import collect
from bridgeport.calibration.observers import ObserverSettings

def feeds():
    with np.load(sys.argv[2]) as archive:
        for index in range(9):
            if index == int(sys.argv[4]):
                os.kill(os.getpid(), signal.SIGKILL)
            yield {"x": archive[str(index)]}

settings = ObserverSettings(observers=("minmax", "moving-average", "percentile"), rows=8)
collect(Path(sys.argv[1]), feeds(), ("x", "h", "a", "y"), key="data", samples=9, settings=settings,
        cache=Path(sys.argv[3]), save_every=2)
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(graph: Path, feeds: Feeds, tmp_path: Path) -> None:
    """SIGKILL at sample 3, then at sample 6, then to the end."""
    data = tmp_path / "feeds.npz"
    np.savez(data, **{str(index): feed["x"] for index, feed in enumerate(feeds)})  # type: ignore[arg-type]
    folder = tmp_path / "cache"
    for at in (3, 6):
        arguments = [str(graph), str(data), str(folder), str(at)]
        process = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=os.environ, check=False)
        assert process.returncode == -signal.SIGKILL
    done: list[int] = []
    resumed = run(graph, feeds, cache=folder, progress=lambda *args: done.append(args[0]))
    assert done == [7, 8, 9]
    assert_same(resumed, run(graph, feeds))


def test_a_write_that_dies_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.npz"
    cache_module.write_arrays(file, {"a": np.arange(3)}, {"done": 1})

    def die(target: Any, **_: Any) -> None:
        target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", die)
    with pytest.raises(KeyboardInterrupt):
        cache_module.write_arrays(file, {"a": np.arange(4)}, {"done": 2})
    arrays, meta = cache_module.read_arrays(file)
    np.testing.assert_array_equal(arrays["a"], np.arange(3))
    assert meta == {"done": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_nan_and_infinity_name_node_layer_and_sample(graph: Path, feeds: Feeds) -> None:
    """Sqrt of a negative number; a node traced in a module names it."""
    model = onnx.load(graph, load_external_data=False)
    node = next(one for one in model.graph.node if one.output[0] == "root")
    entry = node.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'encoder.layers.3.mlp', 'root']"
    onnx.save(model, graph)
    with pytest.raises(
        CalibrationError, match=r"sample 0: value 'root', computed by node 'node_root' of layer .*nan in"
    ):
        run(graph, feeds, watch=("root", "y"))
    feeds[4]["x"][0, 2, 1] = np.inf
    with pytest.raises(CalibrationError, match=r"sample 4: value 'x', an input of the graph, is inf in 1 of 40 places"):
        run(graph, feeds)


def test_constant_activations_are_reported(graph: Path, feeds: Feeds) -> None:
    observed = run(graph, feeds, watch=("x", "nothing", "a"))
    assert constant_tensors(observed) == ("nothing",)
    assert constant_tensors(run(graph, [{"x": np.ones((1, 5, 8), np.float32)}] * 9, watch=("x", "y"))) == ("x",)


def without_input(_: Feeds) -> Feeds:
    return [{"pixels": np.ones(1)}]


def of_wrong_shape(_: Feeds) -> Feeds:
    return [{"x": np.ones((1, 5, 9), np.float32)}]


def empty(_: Feeds) -> Feeds:
    return [{"x": np.ones((0, 5, 8), np.float32)}] * 9


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (None, {"watch": ("x", "gelu")}, "no value 'gelu'"),
        (None, {"watch": ("w1",)}, "no value 'w1'"),
        (None, {"watch": ("size",)}, "value 'size' is INT64"),
        (None, {"samples": 0}, "one at least"),
        (None, {"samples": 10}, "gave 9 samples of the 10"),
        (without_input, {}, "sample 0 has no input 'x'"),
        (of_wrong_shape, {}, "sample 0 does not run"),
        (empty, {}, "value 'x' was empty"),
    ],
)
def test_what_cannot_be_observed_is_refused(
    graph: Path, feeds: Feeds, change: Callable[[Feeds], Feeds] | None, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(CalibrationError, match=said):
        run(graph, feeds if change is None else change(feeds), **options)
