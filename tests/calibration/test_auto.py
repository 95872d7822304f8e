"""Mixed precision: what layers save, which ones stay in float, and a bundle that passes by it alone."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests.calibration.blocks import block_inputs, block_model, observed
from tests.export.graphs import float_value, make_model, run, save, weight

from bridgeport.bundle import Bundle, read_manifest, write_manifest
from bridgeport.calibration import GateFailed, GateLimits, QuantizeOptions, auto_cpu, cpu, quantize, quantize_bundle
from bridgeport.calibration.auto import MARGIN, Candidates, Judge, LayerTimes, choose_float_layers, hold_aside
from bridgeport.calibration.auto_cpu import LayerClock
from bridgeport.calibration.auto_tensorrt import Accelerator, modelled_ms
from bridgeport.calibration.data import CalibrationData, open_calibration
from bridgeport.calibration.job import StageJob
from bridgeport.calibration.linears import find_linears
from bridgeport.calibration.placement.cpu import CPU_SCHEMES, quantize_cpu, watch_cpu
from bridgeport.calibration.search import Keep
from bridgeport.calibration.sensitivity import LayerDamage, rank_layers
from bridgeport.calibration.task import write_small_data
from bridgeport.errors import OutputError
from bridgeport.export.graph import save_graph
from bridgeport.models.small.pictures import generate

Feed = Mapping[str, NDArray[Any]]
PICTURES = 12
# The product that only float survives, in `spoiled`.
SPOILED_LAYER, SPOILED_NODE = "model.encoder.layers.2.mlp.fc2", "node_MatMul_74"


@dataclass(frozen=True)
class _Job(StageJob):
    """A job whose samples are given."""

    given: tuple[Feed, ...] = ()

    def feeds(self, start: int = 0, *, concatenated: bool = False) -> Any:
        return iter(self.given[start:])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto-pictures")
    for number, example in enumerate(generate(1, PICTURES)):
        example.image.save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def job(small_bundle: Path, pictures: Path, tmp_path: Path) -> StageJob:
    source = Bundle.load(small_bundle)
    options = QuantizeOptions("int8", auto=True, report=tmp_path / "report", cache=tmp_path / "cache")
    data = open_calibration(pictures, bundle=source)
    record = source.manifest.stage("encoder")
    return StageJob(source, tmp_path / "out", record, "int8", options, data, lambda _: None, {}, 0.98)


def with_samples(job: StageJob, data: CalibrationData, *given: Feed) -> _Job:
    return _Job(
        job.source, job.staging, job.record, "int8", job.options, data, job.say, {}, job.min_cosine, given=given
    )


def test_some_pictures_are_held_aside(job: StageJob) -> None:
    held, aside = hold_aside(job)
    assert (held.data.pictures, len(aside)) == (9, 3)
    assert {one.digest for one in held.data.units} < {one.digest for one in job.data.units}
    assert held.min_cosine == pytest.approx(0.98 + MARGIN * 0.02)
    calibrating = [feed["pixel_values"] for feed in held.feeds()]
    assert not any(np.array_equal(one["pixel_values"], other) for one in aside for other in calibrating)
    plain = replace(job, options=replace(job.options, auto=False))
    assert hold_aside(plain) == (plain, ())


def test_a_report_that_cannot_be_written_is_refused_at_once(job: StageJob, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    blocked = replace(job, options=replace(job.options, report=tmp_path / "file"))
    with pytest.raises(OutputError, match=r"--report: .*file/encoder cannot be written .*choose another directory"):
        hold_aside(blocked)


def test_the_judge_takes_the_worst_token_of_all(job: StageJob) -> None:
    """Tokens turn by 0.6, 0.8 (cosines 0.8 and 0.6) in the pictures held aside and behind."""
    x, y = np.array([1.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)
    aside = [{"x": np.array([1.0], np.float32)}, {"x": np.array([0.6], np.float32)}]
    behind = {"x": np.array([0.8], np.float32)}
    calls = []

    def reference(feed: Feed) -> dict[str, NDArray[Any]]:
        calls.append(round(float(feed["x"][0]), 3))
        return {"out": np.stack([x, x]), "other": np.stack([y])}

    def candidate(feed: Feed) -> dict[str, NDArray[Any]]:
        turned = feed["x"][0]
        return {"out": np.stack([x, turned * y + np.sqrt(1 - turned**2) * x]), "other": np.stack([y])}

    judge = Judge(with_samples(job, job.data, behind), reference, aside[1:])
    assert judge.few(candidate) == pytest.approx(0.8)
    assert judge.many(candidate) == pytest.approx(0.6)
    assert judge.few(lambda feed: {"out": np.full((2, 2), np.nan), "other": np.stack([y])}) == -1.0
    # Once for the picture held aside, however often it judges.
    assert calls.count(0.6) == 1


def damages() -> list[LayerDamage]:
    return [
        LayerDamage(0, ("query", "key", "value"), "attention", 0.02, 0.1),
        LayerDamage(2, ("fc1",), "fc1", 0.01, 0.1),
        LayerDamage(3, ("fc2",), "fc2", 0.001, 0.1),
    ]


def chosen(job: StageJob, monkeypatch: pytest.MonkeyPatch, evaluate: Any, verify: Any = None) -> Any:
    """With ranking and times given: fc1 is slower in INT8."""
    from bridgeport.calibration import auto

    monkeypatch.setattr(auto, "rank_layers", lambda *_, **__: tuple(damages()))
    saved = {"query": 1.0, "key": 1.0, "value": 1.0, "fc1": -0.5, "fc2": 2.0}
    candidates = Candidates(Path("graph.onnx"), (), {})
    times = LayerTimes(saved, 10.0, "by hand")
    return choose_float_layers(job, candidates, lambda _: times, evaluate, verify or evaluate)


def unreported(job: StageJob) -> StageJob:
    return replace(job, options=replace(job.options, report=None))


def attention_matters(keep: Keep) -> float:
    return 0.999 if "query" in keep else 0.9


def test_what_stays_in_float_is_said_with_its_reason(job: StageJob, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = chosen(job, monkeypatch, attention_matters)
    alone = "sensitivity: cosine loss 0.02 alone"
    assert layers.keep == {"query": alone, "key": alone, "value": alone, "fc1": "not faster in low precision"}
    details = layers.details["auto"]
    assert (details["found"], details["layers"], details["in_float"]) == (True, 3, 2)
    assert details["ranking"] == [["attention", 0.02], ["fc1", 0.01], ["fc2", 0.001]]
    assert ["2", "12.50", "0.999000", "yes", "yes"] in details["pareto"]
    report = Path(job.options.report or "") / "encoder"
    with (report / "sensitivity.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1] == ["attention", "query key value", "2.000e-02", "1.000e-01", "3.0000", "yes"]
    assert [row[-1] for row in rows[1:]] == ["yes", "yes", ""]
    assert (report / "pareto.png").stat().st_size > 1000
    assert (report / "pareto.csv").read_text(encoding="utf-8").splitlines()[1:] == [
        ",".join(row) for row in details["pareto"][1:]
    ]


def test_where_no_set_is_exact_enough_nothing_stays(job: StageJob, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = chosen(unreported(job), monkeypatch, attention_matters, verify=lambda keep: 0.9)
    assert layers.keep == {}
    assert layers.details["auto"]["found"] is False


def test_a_set_that_more_pictures_refuse_is_widened(job: StageJob, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = chosen(
        unreported(job), monkeypatch, attention_matters, verify=lambda keep: 0.999 if "fc2" in keep else 0.9
    )
    assert "fc2" in layers.keep
    # The set as few pictures judged it is not shown beside what more pictures said of it.
    cosines = [row[2] for row in layers.details["auto"]["pareto"] if row[0] == "2"]
    assert cosines == ["0.900000"]


def plant_times(patch: pytest.MonkeyPatch, milliseconds: Mapping[str, float]) -> None:
    def race(runs: Mapping[str, Any], feed: Feed, rounds: int) -> dict[str, list[float]]:
        for one in runs.values():
            one(feed)
        return {name: [milliseconds[name]] * rounds for name in runs}

    patch.setattr(auto_cpu, "race", race)
    patch.setattr(cpu, "race", race)


def saved_of(graph: Path, scheme: str, work: Path, *, fused: bool = False) -> tuple[dict[str, float], list[Feed]]:
    """Milliseconds saved of the block's layers, and what each layer's graph gave in float and in INT8."""
    model = ir.load(graph)
    feed, ranges = block_inputs(model), observed(model, watch_cpu(model), block_inputs(model))
    outputs: list[Feed] = []

    def open_graph(file: Path) -> Any:
        inner, _ = cpu.open_engine("onnxruntime", 1)
        opened = inner(file)

        def noted(given: Feed) -> Feed:
            outputs.append(opened(given))
            return outputs[-1]

        return noted

    def layer(number: int, *nodes: str) -> LayerDamage:
        return LayerDamage(number, nodes, nodes[0], 0.1, 0.1)

    ranked = [layer(0, "query", "key", "value"), layer(1, "projection"), layer(2, "fc1"), layer(3, "fc2")]

    def quantized(file: Path, out: Path) -> Path:
        quantize_cpu(file, out, ranges, frozenset(), scheme)
        return out

    return LayerClock(graph, feed, fused=fused).saved_ms(ranked, open_graph, quantized, work), outputs


def test_each_layer_is_timed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its graph computes is what the whole graph does there; the savings are shared by its products."""
    plant_times(monkeypatch, {"float": 3.0, "int8": 1.0})
    model = block_model()
    saved, outputs = saved_of(save(model, tmp_path), "static-u8s8", tmp_path)
    assert saved == {"query": 2 / 3, "key": 2 / 3, "value": 2 / 3, "projection": 2.0, "fc1": 2.0, "fc2": 2.0}
    names = ("query.add.out", "key.add.out", "value.add.out", "projection.add.out", "fc1.add.out", "fc2.add.out")
    values = ir.convenience.create_value_mapping(model.graph)
    model.graph.outputs.extend(values[name] for name in names)
    expected = dict(zip(("y", *names), run(model, block_inputs(model)), strict=True))
    assert len(outputs) == 8
    assert [sorted(one) for one in outputs[::2]] == [sorted(names[:3]), *([name] for name in names[3:])]
    for one in outputs:  # INT8 differs by a step or two, a wrong input or bias by much more
        for name, value in one.items():
            np.testing.assert_allclose(value, expected[name], atol=0.08, err_msg=name)


@pytest.mark.parametrize(("int8", "saved"), [(3.2, 0.03), (3.4, -0.4), (2.999, 0.03)])
def test_a_difference_within_the_noise_is_none(
    int8: float, saved: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_times(monkeypatch, {"float": 3.0, "int8": int8})
    found, _ = saved_of(save(block_model(), tmp_path), "dynamic-s8", tmp_path)
    assert found["fc1"] == pytest.approx(saved)


def test_a_fused_attention_is_timed_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_times(monkeypatch, {"float": 3.0, "int8": 1.0})
    _, outputs = saved_of(save(block_model(), tmp_path), "dynamic-s8-attention", tmp_path, fused=True)
    assert [sorted(one) for one in outputs[:2]] == [["joined.out"], ["joined.out"]]


def test_layers_of_one_shape_are_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_times(monkeypatch, {"float": 3.0, "int8": 1.0})
    x, ones = float_value("x", "batch", 4, 8), np.ones((8, 8), np.float32)
    nodes = [ir.node("MatMul", [x, weight("w0", ones)], name="m0")]
    for index in (1, 2):
        nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], weight(f"w{index}", ones)], name=f"m{index}"))
    for node in nodes:
        node.outputs[0].name = f"{node.name}.out"
    graph = save(make_model([x], [nodes[-1].outputs[0]], nodes), tmp_path)
    opened: list[Path] = []

    def open_graph(file: Path) -> Any:
        opened.append(file)
        return lambda feed: {}

    ranked = [LayerDamage(i, (f"m{i}",), "", 0.1, 0.1) for i in range(3)]
    clock = LayerClock(graph, {"x": np.ones((1, 4, 8), np.float32)}, fused=False)
    assert clock.saved_ms(ranked, open_graph, lambda file, out: file, tmp_path) == {"m0": 2.0, "m1": 2.0, "m2": 2.0}
    assert len(opened) == 2


def test_the_model_of_an_accelerator_by_hand(tmp_path: Path) -> None:
    """4 x 8 times 8 x 16, 1024 operations, 4 * 8 + 8 * 16 = 160 numbers read and 64 written. At 1 TB/s and few
    operations a second these count, on fast units bytes do.
    """
    x = float_value("x", "batch", 4, 8)
    node = ir.node("MatMul", [x, weight("w", np.ones((8, 16), np.float32))], name="m")
    node.outputs[0].name = "y"
    graph = save(make_model([x], [node.outputs[0]], [node]), tmp_path)
    linears, feed = find_linears(ir.load(graph)), {"x": np.ones((1, 4, 8), np.float32)}
    slow = modelled_ms(graph, linears, feed, Accelerator("slow", 1024e3, 2048e3, 1e12))
    assert slow[0] == pytest.approx({"m": 0.5})
    assert slow[1] == pytest.approx(0.5)
    fast = modelled_ms(graph, linears, feed, Accelerator("fast", 1e15, 2e15, 16e3))
    before, after = (2 * 160 + 2 * 64) / 16, (160 + 2 * 64) / 16
    assert fast[0] == pytest.approx({"m": before - after})
    assert fast[1] == pytest.approx(after)


def test_ranking_in_fp8_rounds_to_its_numbers(tmp_path: Path) -> None:
    """With 448 as the largest E4M3 has 1 and 256, not 260; INT8 has steps of 3.5."""
    x = float_value("x", "batch", 3)
    node = ir.node("MatMul", [x, weight("w", np.eye(3, dtype=np.float32))], name="m")
    node.outputs[0].name = "y"
    graph = save(make_model([x], [node.outputs[0]], [node]), tmp_path)
    feed = {"x": np.array([[448.0, 1.0, 260.0]], np.float32)}
    ranges = observed(ir.load(graph), ("x",), feed)
    (eight,) = rank_layers(graph, [feed], ranges, fp8=True)
    power = float((feed["x"] ** 2).sum())
    assert eight.relative_mse == pytest.approx(4.0**2 / power, rel=1e-3)  # 260 becomes 256
    (integer,) = rank_layers(graph, [feed], ranges)
    rounded = np.rint(feed["x"] / (448 / 127)) * (448 / 127)
    assert integer.relative_mse == pytest.approx(float(((rounded - feed["x"]) ** 2).sum()) / power, rel=1e-3)


@pytest.fixture(scope="module")
def spoiled(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with one layer that no INT8 computes: two inputs of an fc2 are large and the same, their rows of
    the weight large and opposite. In float they cancel. In INT8 they leave no steps to the others, in activations or in
    weights, whichever smoothing favours.
    """
    out = tmp_path_factory.mktemp("spoiled") / "bundle"
    shutil.copytree(small_bundle, out)
    file = out / "encoder" / "model.onnx"
    model = ir.external_data.load_to_model(ir.load(file))
    prefix = "model.encoder.layers.2.mlp."
    names = [prefix + name for name in ("fc1.weight.transposed", "fc1.bias", "fc2.weight.transposed")]
    tensors = [model.graph.initializers[name].const_value for name in names]
    up, bias, down = (tensor.numpy().copy() for tensor in tensors if tensor is not None)
    up[:, 0], bias[0] = 100 * up[:, 0], 100 * bias[0]
    up[:, 1], bias[1] = up[:, 0], bias[0]
    down[0] = 50.0 * (-1.0) ** np.arange(down.shape[1])
    down[1] = -down[0]
    for name, array in zip(names, (up, bias, down), strict=True):
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    save_graph(model, file)
    write_manifest(out, read_manifest(out))
    return out


def quantised(
    bundle: Path, data: Path, work: Path, *, target: str = "cpu", min_cosine: float | None = None, auto: bool = False
) -> Bundle:
    """The encoder in INT8, the rest as it is or in FP16, judged by cosine alone."""
    rest = "fp32" if target == "cpu" else "fp16"
    options = QuantizeOptions(
        "int8", target, {"connector": rest, "llm": rest}, auto=auto, report=work / "report", cache=work / "cache"
    )
    limits = GateLimits(min_cosine, max_slowdown=1000.0, task_drop=100.0)
    return quantize_bundle(bundle, work / f"out-{auto}", data, options, limits=limits)


def test_what_fails_the_gate_passes_with_the_planted_layer_in_float(
    spoiled: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured: worst token 0.946 without."""
    plant_times(monkeypatch, {"float": 2.0, "int8": 1.0, cpu.FLOAT32: 4.0, "dynamic-s8": 2.0, "static-u8s8": 1.0})
    monkeypatch.setattr(quantize, "time_bundles", lambda *_: {})
    for scheme in set(CPU_SCHEMES) - {"dynamic-s8", "static-u8s8"}:
        monkeypatch.delitem(CPU_SCHEMES, scheme)
    with pytest.raises(GateFailed, match="encoder: worst token's cosine") as failed:
        quantised(spoiled, pictures, tmp_path)
    assert failed.value.report.stages[0].blame == SPOILED_LAYER
    record = quantised(spoiled, pictures, tmp_path, auto=True).manifest.stage("encoder").quantization
    assert record is not None
    why = {node: text for node, text in record.kept.items() if text.startswith("sensitivity")}
    assert set(why) == {SPOILED_NODE}
    assert record.details["auto"]["ranking"][0][0] == SPOILED_LAYER
    # With that layer in float the faster scheme is exact enough too, and its speed is what the hint has.
    assert record.scheme == record.details["speed_hint"]["scheme"] == "static-u8s8"
    names = {file.name for file in (tmp_path / "report" / "encoder").iterdir()}
    assert names == {"pareto.png", "pareto.csv", "sensitivity.csv"}


@pytest.mark.slow
def test_a_budget_that_plain_int8_misses_on_tensorrt(small_bundle: Path, tmp_path: Path) -> None:
    """Measured: 0.99928 without, 0.99962 with 11 of 16 layers in FP16."""
    data = write_small_data(tmp_path / "data", 48)
    with pytest.raises(GateFailed, match=r"at least 0\.9995 is wanted"):
        quantised(small_bundle, data, tmp_path, target="tensorrt", min_cosine=0.9995)
    made = quantised(small_bundle, data, tmp_path, target="tensorrt", min_cosine=0.9995, auto=True)
    record = made.manifest.stage("encoder").quantization
    assert record is not None
    assert 0 < record.details["auto"]["in_float"] < record.details["auto"]["layers"]
    assert record.details["auto"]["latency"].startswith("modelled, not measured")
