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
    bump,
    change_attribute,
    change_manifest,
    change_weight,
    changed,
    mean,
    plant_into,
    prompt,
    resample,
    swap_rows,
    tiling,
)

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


ENCODER = "vision_model.encoder.layers"
QFORMER = "qformer.encoder.layer"
LLAMA = "language_model.model.layers"
OPT = "language_model.model.decoder.layers"

# What each fault does to its own stage is at least ten times the gate; docs/parity.md has the figures.
FAULTS: dict[str, Fault] = {
    "encoder-patch-embedding": Fault(
        change_weight("encoder", "model.embeddings.patch_embedding.weight", bump(3, 1, 2, 5, by=0.2)),
        "encoder",
        "vision_model.embeddings.patch_embedding",
        "Conv",
        "1 of 18816 values of vision_model.embeddings.patch_embedding.weight differ",
    ),
    "encoder-query-weight": Fault(
        change_weight("encoder", "model.encoder.layers.1.self_attn.qkv.weight.transposed.query", bump(3, 5, by=0.3)),
        "encoder",
        f"{ENCODER}.1.self_attn.qkv (query)",
        "Add",
        f"1 of 1024 values of {ENCODER}.1.self_attn.qkv.weight differ",
    ),
    "encoder-swapped-positions": Fault(
        change_weight("encoder", "alias", swap_rows(1, 4)),
        "encoder",
        "vision_model.embeddings",
        "Add",
        "rows [1, 4] of vision_model.embeddings.position_embedding stand in each other's place",
    ),
    "encoder-epsilon": Fault(
        change_attribute("encoder", "LayerNormalization", 2, "epsilon", 1e-3),
        "encoder",
        f"{ENCODER}.1.layer_norm1",
        "LayerNormalization",
        "epsilon of node_layer_norm_2 is 0.001, PyTorch has 1e-06",
    ),
    "encoder-epsilon-too-small-to-see": Fault(
        change_attribute("encoder", "LayerNormalization", 3, "epsilon", 1.5e-6),
        "encoder",
        f"{ENCODER}.1.layer_norm2",
        "LayerNormalization",
        "epsilon of node_layer_norm_3 is 1.5e-06, PyTorch has 1e-06",
    ),
    "encoder-attention-scale": Fault(
        change_weight("encoder", "val_25", lambda array: array.__imul__(1.1)),
        "encoder",
        f"input of {ENCODER}.0.self_attn.projection",
        "Reshape",
    ),
    "connector-swapped-query": Fault(
        change_weight("connector", "qformer.query_tokens", swap_rows(0, 2)),
        "connector",
        "input of qformer.layernorm",
        "Expand",
        "rows [0, 2] of query_tokens stand in each other's place",
    ),
    "connector-cross-attention-key": Fault(
        change_weight("connector", "qformer.layers.2.cross_attention.key.weight.transposed", bump(1, 7, by=0.3)),
        "connector",
        f"{QFORMER}.2.crossattention.attention.key",
        "Add",
        f"1 of 768 values of {QFORMER}.2.crossattention.attention.key.weight differ",
    ),
    "connector-epsilon": Fault(
        change_attribute("connector", "LayerNormalization", 5, "epsilon", 1e-3),
        "connector",
        f"{QFORMER}.1.output_query.LayerNorm",
        "LayerNormalization",
        "PyTorch has 1e-12",
    ),
    "connector-projection": Fault(
        change_weight("connector", "language_projection.bias", bump(9, by=0.05)),
        "connector",
        "language_projection",
        "Add",
        "1 of 64 values of language_projection.bias differ",
    ),
    "embed-tokens": Fault(
        # The first token of every prompt, BOS.
        change_weight("embed_tokens", "weight", bump(1, 11, by=0.1)),
        "merged_embeddings",
        "language_model.model.embed_tokens",
        "Gather",
        "1 of 20736 values of language_model.model.embed_tokens.weight differ",
    ),
    "llm-packed-weight": Fault(
        change_weight("llm", "model.layers.1.attn.qkv_proj.MatMul.weight", bump(8, 70, by=0.3)),
        "first_logits",
        f"{LLAMA}.1.self_attn.{{q_proj,k_proj,v_proj}}",
        "MatMul",
        f"1 of 12288 values of {LLAMA}.1.self_attn.{{q_proj,k_proj,v_proj}}.weight differ",
    ),
    "llm-rotary-table": Fault(
        change_weight("llm", "sin_cache", lambda array: array.__imul__(-1)),
        "first_logits",
        f"input of {LLAMA}.0.self_attn.o_proj",
        "GroupQueryAttention",
    ),
    "llm-epsilon": Fault(
        change_attribute("llm", "SkipSimplifiedLayerNormalization", 1, "epsilon", 1e-2),
        "first_logits",
        f"{LLAMA}.1.input_layernorm",
        "SkipSimplifiedLayerNormalization",
        "epsilon of /model/layers.1/input_layernorm/SkipLayerNorm is 0.01, PyTorch has 1e-06",
    ),
    "llm-head": Fault(
        change_weight("llm", "lm_head.MatMul.weight", bump(3, 200, by=0.5)),
        "first_logits",
        "language_model.lm_head",
        "MatMul",
        "1 of 20736 values of language_model.lm_head.weight differ",
    ),
    "resize-bilinear": Fault(
        resample("bilinear"),
        "pixels",
        "BlipImageProcessorPil, resize",
        cause="resample is bilinear, the checkpoint's processor has bicubic",
    ),
    "resize-lanczos": Fault(
        resample("lanczos"),
        "pixels",
        "BlipImageProcessorPil, resize",
        cause="resample is lanczos, the checkpoint's processor has bicubic",
    ),
    "normalisation-mean": Fault(
        mean(0.48145466, 0.4578275, 0.4082),
        "pixels",
        "BlipImageProcessorPil, normalize",
        cause="mean is [0.48145466, 0.4578275, 0.4082]",
    ),
    "placeholder-count": Fault(tiling(tokens=3), "placeholder_ids", cause="3 image placeholders, PyTorch has 4"),
    "placeholder-position": Fault(prompt(segments=TEXT_FIRST), "placeholder_ids", cause="in PyTorch at [0]"),
    "placeholder-id": Fault(prompt(image_token_id=7), "placeholder_ids", cause="position 0 holds 7"),
}


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


OPT_FAULTS: dict[str, Fault] = {
    "learned-positions": Fault(
        # Row 2 is position 0: OPT's table has two rows of offset.
        change_weight("llm", "model.decoder.embed_positions.weight", bump(2, 30, by=0.2)),
        "first_logits",
        "language_model.model.decoder.embed_positions",
        "Gather",
        "language_model.model.decoder.embed_positions.weight differ",
    ),
    "value-weight": Fault(
        change_weight("llm", "model.decoder.layers.1.self_attn.v_proj.weight.transposed", bump(6, 2, by=0.4)),
        "first_logits",
        f"{OPT}.1.self_attn.v_proj",
        "Add",
        f"1 of 4096 values of {OPT}.1.self_attn.v_proj.weight differ",
    ),
    "epsilon": Fault(
        change_attribute("llm", "LayerNormalization", 3, "epsilon", 1e-2),
        "first_logits",
        f"{OPT}.1.final_layer_norm",
        "LayerNormalization",
        "PyTorch has 1e-05",
    ),
}


@pytest.mark.parametrize("fault", OPT_FAULTS)
def test_fault_in_opt_is_caught_and_named(
    bundles: Bundles, blip2_checkpoint: Callable[[str], Path], tmp_path: Path, fault: str
) -> None:
    planted = OPT_FAULTS[fault]
    bundle = plant_into(bundles("opt", "fp32"), tmp_path / "bundle", planted)
    check_report(check_parity(bundle, blip2_checkpoint("opt"), drill=True, max_new_tokens=FEW), planted)


INT4_FAULTS: dict[str, Fault] = {
    "scale": Fault(
        change_weight("llm", "model.layers.0.mlp.down_proj.MatMul.weight_scales", lambda array: array[5].__imul__(1.5)),
        "first_logits",
        f"{LLAMA}.0.mlp.down_proj",
        "MatMulNBits",
        "/model/layers.0/mlp/down_proj/MatMul_Q4 holds",
    ),
    "epsilon": Fault(
        change_attribute("llm", "SkipSimplifiedLayerNormalization", 1, "epsilon", 1e-1),
        "first_logits",
        f"{LLAMA}.1.input_layernorm",
        "SkipSimplifiedLayerNormalization",
        "epsilon of /model/layers.1/input_layernorm/SkipLayerNorm is 0.1",
    ),
    "rotary-table": Fault(
        change_weight("llm", "sin_cache", lambda array: array.__imul__(-1)),
        "first_logits",
        f"input of {LLAMA}.0.self_attn.o_proj",
        "GroupQueryAttention",
    ),
    "encoder-weight": FAULTS["encoder-query-weight"],
}


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
