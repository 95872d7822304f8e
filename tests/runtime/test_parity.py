"""A right bundle passes; each planted fault is caught, and stage and node are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.checkpoints import write_blip2_checkpoint

from bridgeport.bundle import read_manifest, write_manifest
from bridgeport.errors import CheckpointError, InputError, UnsupportedError
from bridgeport.export.llm import export_llm
from bridgeport.models import load_checkpoint
from bridgeport.runtime import ParityReport, check_parity
from bridgeport.runtime.parity.gates import STAGES

from .parity_faults import (
    TEXT_FIRST,
    Fault,
    change_manifest,
    changed,
    plant_into,
    prompt,
)
from .parity_planted import FAULTS, INT4_FAULTS, OPT_FAULTS

Bundles = Callable[[str, str], Path]
# Enough for tokens to differ, few enough to be quick.
FEW = 6
NAMES = [stage.name for stage in STAGES]


@pytest.fixture(scope="session")
def bundles(
    blip2_bundle: Callable[[str], Path],
    blip2_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundles:
    """The bundle of a random checkpoint at a precision, made once; do not change it."""
    made: dict[str, Path] = {}

    def get(name: str, precision: str) -> Path:
        if precision == "fp32":
            return blip2_bundle(name)
        if name not in made:
            out = tmp_path_factory.mktemp("parity") / "int4"
            made[name] = with_int4_decoder(blip2_bundle(name), blip2_checkpoint(name), out)
        return made[name]

    return get


def with_int4_decoder(bundle: Path, checkpoint: Path, out: Path) -> Path:
    """A copy of an FP32 bundle with the decoder that `--precision int4` writes."""
    shutil.copytree(bundle, out)
    model = load_checkpoint(checkpoint)
    manifest = read_manifest(out)
    record = manifest.stage("llm")
    export_llm(model, record.contract, out / record.file, precision="int4")
    stages = (*manifest.stages[:-1], record.model_copy(update={"precision": "int4"}))
    write_manifest(out, manifest.model_copy(update={"stages": stages}))
    return out


@pytest.mark.parametrize(("name", "precision"), [("llama", "fp32"), ("opt", "fp32"), ("llama", "int4")])
def test_right_bundle_passes(
    bundles: Bundles, blip2_checkpoint: Callable[[str], Path], name: str, precision: str
) -> None:
    report = check_parity(bundles(name, precision), blip2_checkpoint(name), drill=True)
    assert report.passed, report.summary()
    assert report.first_divergence is None
    assert report.drill is None
    assert report.same_checkpoint is True
    assert [stage.name for stage in report.stages] == NAMES
    assert report.tokens_match or precision == "int4"


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught_and_named(
    bundles: Bundles, blip2_checkpoint: Callable[[str], Path], tmp_path: Path, fault: str
) -> None:
    planted = FAULTS[fault]
    bundle = plant_into(bundles("llama", "fp32"), tmp_path / "bundle", planted)
    check_report(check_parity(bundle, blip2_checkpoint("llama"), drill=True, max_new_tokens=FEW), planted)


@pytest.mark.parametrize("fault", OPT_FAULTS)
def test_fault_in_opt_is_caught_and_named(
    bundles: Bundles, blip2_checkpoint: Callable[[str], Path], tmp_path: Path, fault: str
) -> None:
    planted = OPT_FAULTS[fault]
    bundle = plant_into(bundles("opt", "fp32"), tmp_path / "bundle", planted)
    check_report(check_parity(bundle, blip2_checkpoint("opt"), drill=True, max_new_tokens=FEW), planted)


@pytest.mark.parametrize("fault", INT4_FAULTS)
def test_fault_in_int4_bundle_is_caught_and_named(
    bundles: Bundles, blip2_checkpoint: Callable[[str], Path], tmp_path: Path, fault: str
) -> None:
    planted = INT4_FAULTS[fault]
    bundle = plant_into(bundles("llama", "int4"), tmp_path / "bundle", planted)
    check_report(check_parity(bundle, blip2_checkpoint("llama"), drill=True, max_new_tokens=FEW), planted)


def check_report(report: ParityReport, planted: Fault) -> None:
    """The stage is the first that diverges, those before it pass both ways, those after it pass on their own."""
    assert not report.passed
    assert report.first_divergence == planted.stage, report.summary()
    before = NAMES[: NAMES.index(planted.stage)]
    assert all(report.stage(name).passed for name in before)
    assert report.drill is not None
    assert any(planted.cause in cause for cause in report.drill.causes) or not planted.cause, report.drill.causes
    if planted.module is not None:
        departure = report.drill.departure
        assert departure is not None, report.drill.note
        assert departure.module == planted.module
        assert planted.operator in (None, departure.op_type)
    if planted.stage not in ("first_logits", "merged_embeddings"):
        others = [stage for stage in report.stages if stage.name not in (planted.stage, "tokens")]
        assert all(stage.isolated.passed for stage in others), "a fault in one stage must not fail another's own run"


def test_epsilon_too_small_to_see_keeps_every_gate(
    bundles: Bundles, blip2_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """So it is the reading of the graph that catches it."""
    fault = FAULTS["encoder-epsilon-too-small-to-see"]
    report = check_parity(plant_into(bundles("llama", "fp32"), tmp_path / "b", fault), blip2_checkpoint("llama"))
    stage = report.stage("encoder")
    assert stage.isolated.passed
    assert [finding.node for finding in stage.findings] == ["node_layer_norm_3"]


def test_fault_in_decoding_alone_is_the_tokens_stage(
    bundles: Bundles, blip2_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A stop token that the checkpoint has not: prefill is right, the chain ends early."""
    checkpoint = blip2_checkpoint("llama")
    whole = check_parity(bundles("llama", "fp32"), checkpoint, prompts=[""])
    early = whole.cases[0].reference_ids[1]
    plant = change_manifest(
        lambda manifest: manifest.model_copy(
            update={"generation": changed(manifest.generation, eos_token_ids=(early,))}
        )
    )
    bundle = plant_into(bundles("llama", "fp32"), tmp_path / "bundle", Fault(plant, "tokens"))
    report = check_parity(bundle, checkpoint, prompts=[""], drill=True)
    assert report.first_divergence == "tokens"
    assert report.stage("tokens").isolated.passed
    assert not report.stage("tokens").chained.passed
    assert not report.tokens_match
    assert report.drill is not None
    assert report.drill.departure is None
    assert report.drill.compared > 10


def test_another_checkpoint_of_the_same_sizes_is_told_apart(bundles: Bundles, tmp_path: Path) -> None:
    """Weights of another seed: every computed stage fails on its own, and no error is raised."""
    other = write_blip2_checkpoint(tmp_path / "other", text="llama", seed=99)
    report = check_parity(bundles("llama", "fp32"), other, drill=True)
    assert report.same_checkpoint is False
    assert report.first_divergence == "encoder"
    computed = ("encoder", "connector", "merged_embeddings", "first_logits", "tokens")
    assert not any(report.stage(name).isolated.passed for name in computed)
    assert report.stage("pixels").passed
    assert report.stage("placeholder_ids").passed
    assert report.drill is not None
    assert report.drill.departure is not None
    assert report.drill.departure.module == "vision_model.embeddings.patch_embedding"


def test_checkpoint_of_other_sizes_is_refused(bundles: Bundles, blip2_checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=r"image_features of connector is \['batch', 4, 64\] in the bundle and"):
        check_parity(bundles("llama", "fp32"), blip2_checkpoint("llama-mqa-wide"))
    with pytest.raises(InputError, match="their key/value caches differ"):
        check_parity(bundles("llama", "fp32"), blip2_checkpoint("llama-gqa-tied"))


def test_chain_that_stops_fails_every_stage_behind(
    bundles: Bundles, blip2_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The prompt has twice as many placeholders as there are features: it is refused, and the report still comes."""
    fault = Fault(prompt(segments=(*TEXT_FIRST, *TEXT_FIRST)), "placeholder_ids")
    report = check_parity(plant_into(bundles("llama", "fp32"), tmp_path / "bundle", fault), blip2_checkpoint("llama"))
    for name in ("encoder", "connector", "merged_embeddings", "first_logits", "tokens"):
        assert report.stage(name).isolated.passed
        assert not report.stage(name).chained.passed
        assert "the chain stopped" in report.stage(name).chained.worst.note
    assert report.to_dict()["stages"][4]["chained"]["max_abs"] is None


def test_prompt_contract_that_cannot_run_is_a_divergence(
    bundles: Bundles, blip2_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    fault = Fault(prompt(segments=(*TEXT_FIRST, *TEXT_FIRST)), "placeholder_ids")
    report = check_parity(
        plant_into(bundles("llama", "fp32"), tmp_path / "bundle", fault), blip2_checkpoint("llama"), drill=True
    )
    assert report.first_divergence == "placeholder_ids"
    assert report.drill is not None
    assert "8 image tokens where its pictures give 4 features" in report.drill.note


def test_own_pictures_and_prompts(bundles: Bundles, blip2_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Files of several modes, an upright-turned one among them; prompts repeat to the number of pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (23, 41, 4), dtype=np.uint8)
    rgba = tmp_path / "rgba.png"
    Image.fromarray(pixels, "RGBA").save(rgba)
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[..., :3]).save(turned, exif=exif)
    images: list[Path | Image.Image] = [rgba, turned, Image.fromarray(pixels[..., 0]).convert("1")]
    report = check_parity(
        bundles("llama", "fp32"), blip2_checkpoint("llama"), images=images, prompts=["Question: {x}?"], max_new_tokens=3
    )
    assert report.passed, report.summary()
    assert [case.picture for case in report.cases] == [
        "rgba.png, 41x23 RGBA",
        "turned.jpg, 41x23 RGB",
        "picture, 41x23 1",
    ]
    assert {case.prompt for case in report.cases} == {"Question: {x}?"}
    assert all(len(case.reference_ids) <= 3 for case in report.cases)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"images": []}, InputError, "images is empty"),
        ({"prompts": []}, InputError, "prompts is empty"),
        ({"images": ["no-such.png"]}, InputError, r"no-such\.png does not exist"),
        ({"max_new_tokens": 0}, InputError, "max_new_tokens is 0"),
        ({"max_new_tokens": 200}, InputError, "the context holds 128"),
    ],
)
def test_bad_input(
    bundles: Bundles,
    blip2_checkpoint: Callable[[str], Path],
    options: dict[str, Any],
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        check_parity(bundles("llama", "fp32"), blip2_checkpoint("llama"), **options)


def test_bad_reference(bundles: Bundles, retrieval_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        check_parity(bundles("llama", "fp32"), tmp_path / "nothing")
    with pytest.raises(UnsupportedError, match="is a Blip2ForImageTextRetrieval; parity of a chain to text"):
        check_parity(bundles("llama", "fp32"), retrieval_checkpoint)
