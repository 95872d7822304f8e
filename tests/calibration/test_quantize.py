"""A bundle from FP32 to another precision, end to end: what is written, what is refused, and what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bridgeport.bundle import Bundle, read_manifest, write_manifest
from bridgeport.calibration import GateFailed, GateLimits, QuantizeOptions, quantize_bundle
from bridgeport.calibration.data import open_calibration
from bridgeport.calibration.data_save import save_stage_inputs
from bridgeport.calibration.quantize import judge
from bridgeport.calibration.rules import check_rules
from bridgeport.calibration.task import write_small_data
from bridgeport.errors import BridgeportError, CalibrationError, CheckFailed, InputError
from bridgeport.manifest import QuantizationRecord
from bridgeport.models.small import checkpoint_path
from bridgeport.runtime import Pipeline, check_parity

PICTURES = 12
# A timing on a machine that runs other tests says nothing.
ANY_SPEED = GateLimits(max_slowdown=1000.0)
LLM_AS_IT_IS = {"llm": "fp32"}
Edit = Callable[[str, np.ndarray[Any, Any]], "np.ndarray[Any, Any] | None"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("quantize") / "data", PICTURES, held_out=True)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for all tests, so that the same activations are observed once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRIDGEPORT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def int8(small_bundle: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("int8") / "bundle"
    return quantize_bundle(small_bundle, out, data, QuantizeOptions("int8"), limits=ANY_SPEED)


def altered(bundle: Path, out: Path, stage: str, edit: Edit) -> Path:
    """A copy whose graph of `stage` holds other weights: `edit` gets name and value, and returns another or None."""
    shutil.copytree(bundle, out)
    manifest = read_manifest(out)
    file = out / manifest.stage(stage).file
    model = onnx.load(str(file))
    found = 0
    for tensor in model.graph.initializer:
        value = edit(tensor.name, numpy_helper.to_array(tensor))
        if value is not None:
            found += 1
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    assert found, [tensor.name for tensor in model.graph.initializer]
    Path(f"{file}.data").unlink()
    onnx.save(model, str(file), save_as_external_data=True, location=f"{file.name}.data", size_threshold=1024)
    write_manifest(out, manifest)
    return out


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_int8_on_the_cpu_is_written_with_what_it_kept(int8: Bundle, small_bundle: Path) -> None:
    manifest = Bundle.load(int8.path).manifest
    assert {one.contract.name: one.precision for one in manifest.stages} == {
        "encoder": "int8",
        "connector": "int8",
        "embed_tokens": "fp32",
        "llm": "int8",
    }
    before = Bundle.load(small_bundle).manifest
    assert [one.contract for one in manifest.stages] == [one.contract for one in before.stages]
    gate = manifest.checks["gate"]
    assert gate["passed"]
    assert [one["stage"] for one in gate["stages"]] == ["encoder", "connector", "llm"]
    for one in gate["stages"]:
        assert one["min_cosine"] <= one["min_token_cosine"] < 1.0
        assert one["before_ms"] > 0
        assert one["after_ms"] > 0
    # A quarter of the pictures judges: three of twelve, with a caption and questions each.
    assert gate["pictures"] == 3
    assert gate["task"]["items"] > 3
    assert gate["task"]["drop"] <= gate["task"]["limit"] == 1.0
    assert gate["task"]["standard_error"] >= 0.0
    assert manifest.calibration is not None
    assert (manifest.calibration.pictures, manifest.calibration.held_out) == (9, 3)
    encoder = manifest.stage("encoder").quantization
    assert encoder is not None
    assert encoder.kept["node_conv2d"] == "it reads pixels"
    assert encoder.details["speed_hint"]["scheme"] == encoder.scheme
    sizes = [sum(file.size for file in one.files if file.path.startswith("encoder/")) for one in (before, manifest)]
    assert sizes[1] < 0.5 * sizes[0]


def test_int8_answers_and_keeps_the_attention_graph(int8: Bundle, held_out_picture: Path, small_bundle: Path) -> None:
    with Pipeline.load(int8) as pipeline, Pipeline.load(small_bundle) as exact:
        assert pipeline.generate(held_out_picture).text == exact.generate(held_out_picture).text
        maps = [one.cross_attention(held_out_picture) for one in (exact, pipeline)]
    assert maps[0].shape == maps[1].shape
    # Rounded, and not another graph: 0.05 of a probability, where a wrong layer would show 0.3 and more.
    assert 0 < np.abs(maps[0] - maps[1]).max() < 0.05


def test_int8_passes_parity_with_the_gates_of_its_precision(int8: Bundle, held_out_picture: Path) -> None:
    report = check_parity(int8, checkpoint_path(), images=[held_out_picture], max_new_tokens=3)
    assert report.passed, report.summary()
    by_name = {stage.name: stage for stage in report.stages}
    assert by_name["encoder"].precision == "int8"
    assert by_name["encoder"].isolated.worst.max_rel > 1e-3
    assert by_name["tokens"].isolated.gate is None


def test_a_missed_gate_writes_nothing_and_names_stage_and_layer(small_bundle: Path, data: Path, tmp_path: Path) -> None:
    limits = GateLimits(min_cosine=0.99999, max_slowdown=1000.0)
    options = QuantizeOptions("int8", stages={**LLM_AS_IT_IS, "connector": "fp32"})
    with pytest.raises(
        GateFailed, match=r"^not written: encoder: worst token's cosine 0\.\d+, at least 0\.99999"
    ) as it:
        quantize_bundle(small_bundle, tmp_path / "out", data, options, limits=limits)
    assert isinstance(it.value, CheckFailed)
    (verdict,) = it.value.report.stages
    assert verdict.stage == "encoder"
    assert verdict.blame
    assert left_in(tmp_path) == []


@pytest.mark.slow
def test_a_slow_bundle_is_refused_with_both_times(small_bundle: Path, data: Path, tmp_path: Path) -> None:
    options = QuantizeOptions("int4")
    with pytest.raises(
        GateFailed, match=r"llm: \d+\.\d\d x the time of FP32 \(\d+\.\d\d against \d+\.\d\d ms\), at most"
    ):
        quantize_bundle(small_bundle, tmp_path / "out", data, options, limits=GateLimits(max_slowdown=0.001))
    assert left_in(tmp_path) == []


def test_a_damaged_layer_is_blamed(small_bundle: Path, data: Path, tmp_path: Path) -> None:
    """What the gate is for: one layer that came out wrong, in a bundle that claims to be quantised."""
    hurt = "encoder.layers.2.mlp.fc1.weight"

    def damage(name: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        return np.roll(value, 1, axis=0) if hurt in name else None

    path = altered(small_bundle, tmp_path / "damaged", "encoder", damage)
    source, manifest = Bundle.load(small_bundle), read_manifest(path)
    record = QuantizationRecord(scheme="planted")
    stages = [
        one.model_copy(update={"precision": "int8", "quantization": record}) if one.contract.name == "encoder" else one
        for one in manifest.stages
    ]
    candidate = Bundle(path, manifest.model_copy(update={"stages": tuple(stages)}))
    _, held_out = open_calibration(data).split(3)
    report = judge(source, candidate, held_out, ANY_SPEED)
    assert not report.passed
    assert report.stages[0].blame is not None
    assert "layers.2.mlp" in report.stages[0].blame


def test_nan_activations_are_named(small_bundle: Path, data: Path, tmp_path: Path) -> None:
    def poison(name: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        return np.full_like(value, np.nan) if "layers.1.layer_norm1.bias" in name else None

    path = altered(small_bundle, tmp_path / "nan", "encoder", poison)
    with pytest.raises(CalibrationError, match=r"layers\.1\.layer_norm1', is nan in 9696 of 9696 places") as caught:
        quantize_bundle(path, tmp_path / "out", data, QuantizeOptions("int8", stages=LLM_AS_IT_IS), limits=ANY_SPEED)
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == ["nan"]


@pytest.mark.slow
def test_constant_activations_have_a_scale(small_bundle: Path, data: Path, tmp_path: Path) -> None:
    """A layer that always gives 0 has no range; it must not divide by it."""

    def silence(name: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        return np.zeros_like(value) if "layers.1.mlp.fc1" in name else None

    path = altered(small_bundle, tmp_path / "constant", "encoder", silence)
    options = QuantizeOptions("int8", stages={**LLM_AS_IT_IS, "connector": "fp32"})
    limits = GateLimits(max_slowdown=1000.0, task_drop=100.0)
    bundle = quantize_bundle(path, tmp_path / "out", data, options, limits=limits)
    assert bundle.manifest.checks["gate"]["stages"][0]["min_token_cosine"] > 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision fp8 cannot run on target cpu"),
        ({"precision": "int9"}, "precision 'int9' is unknown; accepted are fp32, fp16"),
        ({"precision": "int8", "stages": {"decoder": "int8"}}, "stage 'decoder' is unknown; this bundle has encoder"),
    ],
)
def test_bad_options_are_answered_before_the_data_is_read(
    small_bundle: Path, tmp_path: Path, options: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        quantize_bundle(small_bundle, tmp_path / "out", tmp_path / "nowhere", QuantizeOptions(**options))


def test_an_unknown_observer_is_refused() -> None:
    with pytest.raises(InputError, match="--observer 'median' is unknown; accepted are minmax"):
        QuantizeOptions("int8", observer="median")


def test_quantising_twice_is_refused(int8: Bundle, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"was quantised already .*; quantise the FP32 bundle"):
        quantize_bundle(int8.path, tmp_path / "out", data, QuantizeOptions("int8"))


def test_an_output_that_exists_is_kept(small_bundle: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(BridgeportError, match="exists"):
        quantize_bundle(small_bundle, tmp_path / "out", data, QuantizeOptions("int4"))
    assert left_in(tmp_path / "out") == ["mine.txt"]
    assert left_in(tmp_path) == ["out"]


def test_too_few_and_unreadable_pictures_are_listed(small_bundle: Path, data: Path, tmp_path: Path) -> None:
    pictures = sorted(data.glob("*.png"))
    few, broken = tmp_path / "few", tmp_path / "broken"
    for folder, count in ((few, 5), (broken, 10)):
        folder.mkdir()
        for file in pictures[:count]:
            shutil.copy(file, folder)
    with pytest.raises(InputError, match="has 5 different pictures, calibration needs at least 8"):
        quantize_bundle(small_bundle, tmp_path / "out", few, QuantizeOptions("int8"))
    for name in ("bad-1.png", "bad-2.jpg"):
        (broken / name).write_bytes(b"no picture" + name.encode())
    with pytest.raises(InputError, match=r"bad-1\.png.*bad-2\.jpg"):
        quantize_bundle(small_bundle, tmp_path / "out", broken, QuantizeOptions("int8"))
    assert left_in(tmp_path) == ["broken", "few"]


def test_tensors_of_another_checkpoint_or_processor_are_refused(small_bundle: Path, data: Path, tmp_path: Path) -> None:
    source = Bundle.load(small_bundle)
    file = tmp_path / "inputs.npz"
    assert save_stage_inputs(source, open_calibration(data), file) == PICTURES
    assert open_calibration(file, bundle=source).pictures == PICTURES
    manifest = source.manifest
    step = manifest.image.steps[-1].model_copy(update={"std": (0.5, 0.5, 0.5)})
    image = manifest.image.model_copy(update={"steps": (*manifest.image.steps[:-1], step)})
    checkpoint = manifest.checkpoint.model_copy(update={"sha256": {"model.safetensors": "0" * 64}})
    for update, word in (({"image": image}, "processor"), ({"checkpoint": checkpoint}, "checkpoint")):
        other = Bundle(source.path, manifest.model_copy(update=update))
        with pytest.raises(InputError, match=f"inputs.npz was made with another {word} "):
            open_calibration(file, bundle=other)


@pytest.mark.slow
def test_tensors_calibrate_encoder_and_connector(small_bundle: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "inputs.npz"
    save_stage_inputs(Bundle.load(small_bundle), open_calibration(data), file)
    options = QuantizeOptions("fp16", target="cuda", stages={"llm": "fp32"})
    bundle = quantize_bundle(small_bundle, tmp_path / "out", file, options)
    gate = bundle.manifest.checks["gate"]
    assert [one["stage"] for one in gate["stages"]] == ["encoder", "connector"]
    assert gate["task"] is None


@pytest.mark.slow
def test_a_score_bundle_is_quantised_and_scores(
    score_bundle: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    """Its data has answers, which a bundle that generates nothing is not asked for."""
    source = score_bundle("clip")
    bundle = quantize_bundle(source, tmp_path / "out", data, QuantizeOptions("fp16", target="cuda"))
    gate = bundle.manifest.checks["gate"]
    assert "no task: the bundle scores pictures against texts and answers nothing" in gate["notes"]
    assert all(one["min_token_cosine"] > 0.999 for one in gate["stages"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "target", "cosine"),
    [
        ("fp16", "cuda", 0.9999),
        ("int8", "cuda", 0.98),
        ("fp16", "tensorrt", 0.9999),
        ("int8", "tensorrt", 0.98),
        ("fp8", "tensorrt", 0.95),
        ("int4", "tensorrt", 0.4),
    ],
)
def test_every_target_passes_its_gate_its_rules_and_parity(
    small_bundle: Path, tmp_path: Path, precision: str, target: str, cosine: float
) -> None:
    pictures = write_small_data(tmp_path / "data", 32)
    limits = GateLimits(task_drop=2.0)  # one answer of forty is more than a point
    bundle = quantize_bundle(
        small_bundle, tmp_path / "out", pictures, QuantizeOptions(precision, target=target), limits=limits
    )
    gate = bundle.manifest.checks["gate"]
    assert all(one["min_token_cosine"] >= cosine for one in gate["stages"])
    assert any("not timed" in note for note in gate["notes"])
    if target == "tensorrt":
        import onnx_ir as ir

        for stage in bundle.manifest.stages:
            name = stage.contract.name
            found = check_rules(ir.load(bundle.graph(name)), precision=stage.precision, weight_only=name == "llm")
            assert [one for one in found if one.severity == "error"] == []
    report = check_parity(bundle, checkpoint_path(), max_new_tokens=3)
    assert report.passed, report.summary()


@pytest.mark.slow
def test_a_killed_run_leaves_no_bundle_and_goes_on(small_bundle: Path, data: Path, tmp_path: Path) -> None:
    """SIGKILL while the connector is observed: nothing at the output; the next run finds the cache and ends."""
    folder = tmp_path / "work"
    folder.mkdir()
    code = (
        "import sys\n"
        "from bridgeport.calibration import GateLimits, QuantizeOptions, quantize_bundle\n"
        "quantize_bundle(*sys.argv[1:4], QuantizeOptions('int8'), limits=GateLimits(max_slowdown=1000.0),\n"
        "                progress=lambda line: print(line, flush=True))\n"
    )
    environment = {**os.environ, "BRIDGEPORT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, str(small_bundle), str(folder / "out"), str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("connector: observing activations, 4"):
                run.send_signal(signal.SIGKILL)
                break
        run.stdout.close()
        assert run.wait() == -signal.SIGKILL
    assert not (folder / "out").exists()
    kept = list((tmp_path / "cache").rglob("*.npz"))
    assert kept
    lines: list[str] = []
    bundle = quantize_bundle(
        small_bundle,
        folder / "out",
        data,
        QuantizeOptions("int8", cache=tmp_path / "cache" / "calibration"),
        limits=ANY_SPEED,
        progress=lines.append,
    )
    assert json.loads((bundle.path / "manifest.json").read_text())["checks"]["gate"]["passed"]
    # The encoder's activations were read from the cache; the connector's begin anew or where they stopped.
    assert [line for line in lines if line.startswith("encoder: observing")] == [
        "encoder: observing activations, 9 of 9"
    ]
    # SIGKILL runs no clean-up; the next run to the same place does it.
    assert left_in(folder) == ["out"]
