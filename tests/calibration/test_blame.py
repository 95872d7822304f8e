"""The layer that is to blame for a stage of a language model, in every form that such a stage is written in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from bridgeport.bundle import Bundle, read_manifest
from bridgeport.calibration import QuantizeOptions, blame, quantize_bundle
from bridgeport.calibration.blame import blame_layers, find_layer
from bridgeport.calibration.data import CalibrationData, open_calibration
from bridgeport.calibration.gate import GateLimits, GateReport, StageVerdict, TaskVerdict
from bridgeport.calibration.task import write_small_data
from bridgeport.errors import EngineError
from bridgeport.export.passes.standard_decoder import write_standard_decoder

Weight = NDArray[Any]
HURT = "/model/layers.2/mlp/down_proj/MatMul"
MISSED = StageVerdict("llm", "int4", 0.1, 0.4, 0.3, failures=("worst token's cosine 0.1",))
KEPT = StageVerdict("connector", "int8", 0.99, 0.98, 0.01)
WORSE = StageVerdict("encoder", "int8", 0.99, 0.98, 0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("blame") / "data", 8)


@pytest.fixture(scope="module")
def data(folder: Path) -> CalibrationData:
    return open_calibration(folder)


def rolled(weight: Weight) -> Weight:
    return np.roll(weight, 1, axis=0)


def damaged(bundle: Path, out: Path, edit: Callable[[Weight], Weight] = rolled, *, standard: bool = False) -> Bundle:
    """A copy whose decoder has the weight of one product changed; `standard`: in ai.onnx operators."""
    shutil.copytree(bundle, out)
    manifest = read_manifest(out)
    file = out / manifest.stage("llm").file
    if standard:
        (out / "standard").mkdir()
        write_standard_decoder(file, out / "standard" / file.name)
        for made in (out / "standard").iterdir():
            made.replace(file.parent / made.name)
        assert manifest.kv_cache is not None
        cache = manifest.kv_cache.model_copy(update={"shared_buffer": False})
        manifest = manifest.model_copy(update={"kv_cache": cache})
    model = onnx.load(str(file))
    (node,) = (one for one in model.graph.node if one.name == HURT)
    (weight,) = (one for one in model.graph.initializer if one.name == node.input[1])
    weight.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(weight)), weight.name))
    Path(f"{file}.data").unlink()
    onnx.save(model, str(file), save_as_external_data=True, location=f"{file.name}.data", size_threshold=1024)
    return Bundle(out, manifest)


@pytest.mark.parametrize("standard", [False, True])
def test_a_damaged_product_of_the_decoder_is_blamed(
    small_bundle: Path, data: CalibrationData, tmp_path: Path, standard: bool
) -> None:
    """With a shared cache, and with one that grows by concatenation, whose FP32 form is rewritten for it."""
    candidate = damaged(small_bundle, tmp_path / "damaged", standard=standard)
    assert find_layer("llm", Bundle.load(small_bundle), candidate, data) == (HURT, None)


def test_the_first_value_that_is_no_number_is_blamed(small_bundle: Path, data: CalibrationData, tmp_path: Path) -> None:
    """Behind it everything is NaN, and no layer but this one makes it."""
    candidate = damaged(small_bundle, tmp_path / "nan", lambda weight: np.full_like(weight, np.nan))
    layer, note = find_layer("llm", Bundle.load(small_bundle), candidate, data)
    assert layer == HURT
    assert note is not None
    assert note.startswith(f"{HURT}/output_0, which MatMul {HURT} computes in {HURT}, is nan at [0, 0, 0] of sample 0")


def report(*stages: StageVerdict, lost: float = 0.0) -> GateReport:
    return GateReport(stages, 4, TaskVerdict(20, 100.0, 100.0 - lost, lost, 1.0, 1.0))


@pytest.mark.parametrize(
    ("before", "blamed"),
    [
        (report(MISSED, KEPT), {"llm": "a layer of llm", "connector": None}),
        # The task alone was missed: the stage that moved most.
        (
            report(KEPT, StageVerdict("encoder", "int8", 0.99, 0.98, 0.02), lost=5.0),
            {"connector": None, "encoder": "a layer of encoder"},
        ),
        # Only too slow: no layer is wrong.
        (report(KEPT), {"connector": None}),
    ],
)
def test_which_stages_are_looked_into(
    before: GateReport, blamed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blame, "find_layer", lambda stage, *_: (f"a layer of {stage}", None))
    after = blame_layers(before, None, None, None, lambda _: None)  # type: ignore[arg-type]
    assert {one.stage: one.blame for one in after.stages} == blamed
    assert after.failures() == before.failures()


def test_layers_that_cannot_be_compared_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's own verdict must not be lost to it."""

    def fail(*_: Any) -> tuple[str | None, str | None]:
        raise EngineError("no room")

    monkeypatch.setattr(blame, "find_layer", fail)
    after = blame_layers(report(MISSED), None, None, None, lambda _: None)  # type: ignore[arg-type]
    assert after.stages == (MISSED,)
    assert after.notes == ("llm: its layers were not compared (no room)",)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision"), [("cpu", "int8"), ("cuda", "int4"), ("tensorrt", "int4")])
def test_rounded_weights_have_a_layer_to_blame(
    small_bundle: Path, folder: Path, data: CalibrationData, tmp_path: Path, target: str, precision: str
) -> None:
    rest = "fp32" if target == "cpu" else "fp16"
    options = QuantizeOptions(precision, target, {"encoder": rest, "connector": rest}, cache=tmp_path / "cache")
    limits = GateLimits(min_cosine=-1.0, max_slowdown=1000.0, task_drop=100.0)
    made = quantize_bundle(small_bundle, tmp_path / "out", folder, options, limits=limits)
    layer, note = find_layer("llm", Bundle.load(small_bundle), made, data)
    assert note is None
    assert layer is not None
    assert layer.endswith("/MatMul")


@pytest.mark.slow
def test_an_encoder_decoder_has_layers_to_blame(folder: Path, data: CalibrationData, tmp_path: Path) -> None:
    from tests.checkpoints_t5 import T5_CONFIGS, write_blip2_t5_checkpoint

    from bridgeport.export import export_checkpoint

    source = export_checkpoint(write_blip2_t5_checkpoint(tmp_path / "t5", **T5_CONFIGS["odd"]), tmp_path / "bundle")
    limits = GateLimits(min_cosine=-1.0, max_slowdown=1000.0, task_drop=100.0)
    options = QuantizeOptions("fp16", "cuda", {"encoder": "fp32", "connector": "fp32"}, cache=tmp_path / "cache")
    made = quantize_bundle(source.path, tmp_path / "out", folder, options, limits=limits)
    for stage in ("llm_encoder", "llm"):
        layer, note = find_layer(stage, source, made, data)
        assert layer, stage
        assert note is None
