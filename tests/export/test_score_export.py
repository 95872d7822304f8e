"""Scoring checkpoints to bundles: what is written and recorded, and which checkpoints are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tests.checkpoints import copy_of, edit_config, edit_weights
from tests.checkpoints_score import SCORE_CONFIGS

from bridgeport.bundle import Bundle
from bridgeport.errors import CheckpointError, ExportError, UnsupportedError
from bridgeport.export import export_checkpoint
from bridgeport.export.checkpoint_processor import load_processor
from bridgeport.export.score_text import check_frozen_text, freeze_score_tokenizer, freeze_text, tokenizer_options
from bridgeport.export.shared_weights import share_weights
from bridgeport.export.siglip_tokenizer import convert_siglip_tokenizer
from bridgeport.models import load_checkpoint
from bridgeport.score_contract import TextContract

GetPath = Callable[[str], Path]


def external(path: Path) -> dict[str, ir.ExternalTensor]:
    tensors = {name: value.const_value for name, value in ir.load(path).graph.initializers.items()}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)}


def test_retrieval_graphs_share_one_file_of_weights(score_bundle: GetPath, score_checkpoint: GetPath) -> None:
    bundle = Bundle.load(score_bundle("retrieval"))
    assert {stage.contract.name: stage.file for stage in bundle.manifest.stages} == {
        "encoder": "encoder/model.onnx",
        "connector": "connector/model.onnx",
        "text_encoder": "connector/text_encoder.onnx",
        "matcher": "connector/matcher.onnx",
    }
    assert sorted(path.name for path in (bundle.path / "connector").iterdir()) == [
        "matcher.onnx",
        "model.onnx",
        "model.onnx.data",
        "text_encoder.onnx",
    ]
    graphs = {stage: external(bundle.graph(stage)) for stage in ("connector", "text_encoder", "matcher")}
    places = {stage: {(one.offset, one.length) for one in found.values()} for stage, found in graphs.items()}
    # Self-attention is read by all three, cross-attention by two, the text branch by two.
    query = "qformer.layers.0.self_attention.query.weight.transposed"
    assert len({graphs[stage][query].offset for stage in graphs}) == 1
    assert places["connector"] & places["matcher"] - places["text_encoder"]
    assert places["text_encoder"] & places["matcher"] - places["connector"]
    # No byte twice: the file is as long as the places in it together, and no longer than the Q-Former in FP32.
    size = (bundle.path / "connector/model.onnx.data").stat().st_size
    assert size == sum(length or 0 for _, length in set.union(*places.values()))
    entries = load_checkpoint(score_checkpoint("retrieval")).weights.entries.items()
    assert size <= 4 * sum(math.prod(e.shape) for name, e in entries if not name.startswith("vision_model."))


def test_graphs_with_equal_names_and_other_weights_stay_apart(tmp_path: Path) -> None:
    def write(path: Path, values: np.ndarray[Any, np.dtype[np.float32]]) -> Path:
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([values.shape[1]]))
        weight = ir.Value(name="weight", const_value=ir.Tensor(values, name="weight"))
        node = ir.node("MatMul", [weight, x])
        graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20}, name="graph")
        path.parent.mkdir(exist_ok=True)
        ir.save(ir.Model(graph, ir_version=10), path, external_data=f"{path.name}.data", size_threshold_bytes=0)
        return path

    ones, twos = np.ones((3, 4), np.float32), np.full((3, 4), 2, np.float32)
    olds = [
        write(tmp_path / name / "model.onnx", values) for name, values in zip("abc", (ones, twos, ones), strict=True)
    ]
    news = [tmp_path / "a" / name for name in ("model.onnx", "b.onnx", "c.onnx")]
    share_weights(dict(zip(olds, news, strict=True)))
    found = [external(path)["weight"] for path in news]
    assert [float(one.numpy()[0, 0]) for one in found] == [1, 2, 1]
    assert found[0].offset == found[2].offset != found[1].offset
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_contracts(score_bundle: GetPath) -> None:
    retrieval, clip, siglip = (Bundle.load(score_bundle(name)).manifest for name in ("retrieval", "clip", "siglip"))
    assert [stage.contract.name for stage in clip.stages] == ["encoder", "connector", "text_encoder"]
    assert (retrieval.kv_cache, retrieval.prompt, retrieval.generation) == (None, None, None)
    assert retrieval.score is not None
    assert clip.score is not None
    assert siglip.score is not None
    assert [one.score.methods for one in (retrieval, clip, siglip) if one.score] == [
        ("match",),
        ("softmax",),
        ("sigmoid",),
    ]
    assert (retrieval.score.scale, retrieval.score.bias) == (1.0, 0.0)
    assert clip.score.scale == pytest.approx(math.exp(2.1), rel=1e-6)
    assert siglip.score.scale == pytest.approx(math.exp(1.5), rel=1e-6)
    assert siglip.score.bias == pytest.approx(-0.7, rel=1e-6)
    assert clip.score.text == TextContract(
        max_length=24, leading_ids=(601,), trailing_ids=(602,), padding="longest", pad_token_id=602, vocab_size=603
    )
    assert siglip.score.text.padding == "max_length"
    assert not siglip.score.text.attention_mask
    assert [step.op for step in clip.image.steps] == ["resize_shortest", "center_crop", "rescale", "normalize"]
    for manifest in (retrieval, clip, siglip):
        checks = manifest.checks["export"]
        assert set(checks["stages"]) == {stage.contract.name for stage in manifest.stages}
        assert checks["processor"]["texts"] >= 8
        for stage in manifest.stages:
            assert stage.contract.axes[0].name == "batch"


def test_int4_is_refused(score_checkpoint: GetPath, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="int4: CLIPModel has no language model to quantise; export"):
        export_checkpoint(score_checkpoint("clip"), tmp_path / "bundle", precision="int4")
    assert not list(tmp_path.iterdir())


def no_pad_token(path: Path) -> None:
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": None}))


def no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (
            "retrieval",
            lambda path: edit_config(path, image_token_index=320),
            "puts 0 image tokens before a text",
        ),
        ("retrieval-placeholders", lambda path: edit_config(path, image_token_index=None), "and the model cuts 0 off"),
        (
            "clip",
            lambda path: edit_config(path, **{"text_config.eos_token_id": 7}),
            "eos_token_id 7, which the",
        ),
        (
            "clip",
            lambda path: edit_weights(path, lambda state: state["logit_scale"].fill_(100)),
            "logit_scale is 100",
        ),
        ("clip", no_tokenizer, "has no tokenizer"),
        ("siglip-fast", no_pad_token, "the tokenizer has no pad token"),
    ],
)
def test_checkpoints_whose_parts_do_not_fit(
    score_checkpoint: GetPath, tmp_path: Path, name: str, spoil: Callable[[Path], None], message: str
) -> None:
    path = copy_of(score_checkpoint(name), tmp_path / "checkpoint")
    spoil(path)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(path, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"padding_side": "left"},
        {"truncation_side": "left"},
        {"max_length": 20},
        {"leading_ids": ()},
        {"pad_token_id": 5},
        {"padding": "max_length"},
    ],
)
def test_a_wrong_text_contract_is_found(score_checkpoint: GetPath, tmp_path: Path, change: dict[str, Any]) -> None:
    path = score_checkpoint("clip")
    processor = load_processor(path)
    contract = freeze_text(path, processor, positions=24, vocab_size=603, padding="longest")
    frozen = freeze_score_tokenizer(path, processor, 603, tmp_path)
    assert check_frozen_text(processor, contract, frozen)["texts"] >= 8
    wrong = contract.model_copy(update=change)
    with pytest.raises(ExportError, match=r"tokenize: (input_ids|attention_mask) of text"):
        check_frozen_text(processor, wrong, frozen, tokenizer_options(contract))


TEXTS = (
    "a photo of a red circle",
    "  two  spaces, a tab\tand a\nnewline ",
    "\uff26\uff35\uff2c\uff2c \uff57\uff49\uff44\uff54\uff48\uff01 \ufb01ne \u00bd",
    "Z\u00fcrich, \u6771\u4eac, \u0646, \U0001f642\U0001f3fd e\u0301",
    "- a - b_c (d) {e} <f> $g ~h~ \\i",
    "\u2581mark\u2581ed \u2026 \u00a0no\u00a0break",
    "two " * 40,
    "x",
    "circle" * 30,
)


@pytest.mark.parametrize("text", TEXTS)
def test_siglip_tokenizer_without_sentencepiece(score_checkpoint: GetPath, text: str) -> None:
    path = score_checkpoint("siglip")
    slow = load_processor(path).tokenizer
    slow.model_max_length = 10_000  # or it tells of long texts
    assert convert_siglip_tokenizer(path, slow).encode(text).ids == slow(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_in_a_siglip_text_are_words(score_checkpoint: GetPath) -> None:
    path = score_checkpoint("siglip")
    slow = load_processor(path).tokenizer
    frozen = convert_siglip_tokenizer(path, slow)
    assert slow.eos_token_id in slow("a </s> b", add_special_tokens=False)["input_ids"]
    assert frozen.encode("a </s> b").ids == frozen.encode("a s b").ids


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORE_CONFIGS)
def test_whole_export_with_lint(score_checkpoint: GetPath, tmp_path: Path, name: str) -> None:
    bundle = export_checkpoint(score_checkpoint(name), tmp_path / "bundle")
    for checks in bundle.manifest.checks["export"]["stages"].values():
        assert checks["polygraphy_lint"] == "clean"
    assert Bundle.load(bundle.path).manifest == bundle.manifest
