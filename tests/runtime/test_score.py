"""Scoring pictures against texts: equal to transformers' model and processor, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.checkpoints_score import SCORE_CONFIGS, write_score_checkpoint
from tests.runtime.generation import pictures

from bridgeport.bundle import Bundle
from bridgeport.errors import BundleError, InputError
from bridgeport.runtime import Pipeline
from bridgeport.runtime import score as module
from bridgeport.runtime.parity.score import check_score_parity
from bridgeport.runtime.score import Scorer

GetPath = Callable[[str], Path]

FAST = ("retrieval", "clip", "siglip")
TEXTS = ["a photo of a red circle", "two blue squares on the left", "one"]
# Largest error over the RMS of PyTorch's value, any stage, isolated or chained: FP32 through at most four small layers.
# Observed: at most 1e-5 (CLIP's encoder, whose residual stream has outliers).
OF_RMS = 5e-5
# A score near 0 is a difference of products of order 0.1, times a scale of 8: its last digits are theirs.
FLOOR = 1e-6


@pytest.fixture(params=FAST)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def scorer(score_bundle: GetPath, name: str) -> Any:
    with Scorer.load(score_bundle(name), threads=1) as loaded:
        yield loaded


def changed(bundle: Path, **changes: Any) -> Bundle:
    """The bundle with other entries in its score contract (or, with a dot, in the contract of its texts)."""
    loaded = Bundle.load(bundle)
    score = loaded.manifest.score
    assert score is not None
    for key, value in changes.items():
        if key.startswith("text_"):
            text = score.text.model_copy(update={key.removeprefix("text_"): value})
            score = score.model_copy(update={"text": text})
        else:
            score = score.model_copy(update={key: value})
    return Bundle(loaded.path, loaded.manifest.model_copy(update={"score": score}))


@pytest.mark.parametrize("count", [1, 3])
def test_every_stage_equals_transformers(
    score_bundle: GetPath, score_checkpoint: GetPath, name: str, count: int
) -> None:
    report = check_score_parity(
        score_bundle(name), score_checkpoint(name), images=pictures(count), texts=TEXTS[:count], threads=1
    )
    assert report.passed, report.summary()
    assert report.same_checkpoint
    stages = [stage.name for stage in report.stages]
    assert stages[:6] == ["pixels", "input_ids", "encoder", "connector", "text_encoder", "scores"]
    assert stages[6:] == (["matcher"] if name == "retrieval" else []) + ["probabilities"]
    for stage in report.stages:
        for one in (one for run in stage.runs.values() for one in run.cases.values()):
            assert one.max_abs <= OF_RMS * one.scale + FLOOR, f"{stage.name}: {one}"
            assert one.scale > 1e-3  # a value that is nothing would pass


@pytest.mark.slow
@pytest.mark.parametrize("configured", [name for name in SCORE_CONFIGS if name not in FAST])
def test_odd_shapes_equal_transformers(score_bundle: GetPath, score_checkpoint: GetPath, configured: str) -> None:
    for images, texts in ((None, None), (pictures(1), TEXTS[:1])):
        report = check_score_parity(
            score_bundle(configured), score_checkpoint(configured), images=images, texts=texts, threads=1
        )
        assert report.passed, report.summary()
        for stage in report.stages:
            for one in (one for run in stage.runs.values() for one in run.cases.values()):
                assert one.max_abs <= OF_RMS * one.scale + FLOOR, f"{stage.name}: {one}"


def test_default_cases_cut_a_text(score_bundle: GetPath, score_checkpoint: GetPath) -> None:
    report = check_score_parity(score_bundle("clip"), score_checkpoint("clip"), threads=1)
    assert report.passed, report.summary()
    assert len(report.cases[3].prompt.split()) > 24
    assert len(report.cases[3].bundle_ids) == 24


@pytest.mark.parametrize(
    ("name", "change", "stage"),
    [
        ("clip", {"scale": 8.2}, "scores"),
        ("siglip", {"bias": -0.69}, "scores"),
        ("siglip", {"methods": ("softmax",)}, "probabilities"),
        ("clip", {"methods": ("sigmoid",)}, "probabilities"),
        ("siglip", {"text_padding": "longest"}, "input_ids"),
        ("retrieval", {"text_attention_mask": False}, "input_ids"),
        ("retrieval", {"text_leading_ids": (2,)}, "input_ids"),
    ],
    indirect=["name"],
)
def test_a_wrong_contract_is_found(
    score_bundle: GetPath, score_checkpoint: GetPath, name: str, change: dict[str, Any], stage: str
) -> None:
    wrong, texts = changed(score_bundle(name), **change), ["one", "a circle"]  # shorter than any of the models reads
    report = check_score_parity(wrong, score_checkpoint(name), images=pictures(2), texts=texts, threads=1)
    assert report.first_divergence == stage, report.summary()


def test_other_weights_are_found(score_bundle: GetPath, tmp_path: Path) -> None:
    from tests.checkpoints import write_retrieval_checkpoint

    other = write_retrieval_checkpoint(tmp_path / "other", **SCORE_CONFIGS["retrieval"] | {"seed": 8})
    report = check_score_parity(score_bundle("retrieval"), other, images=pictures(2), texts=TEXTS[:2], threads=1)
    assert report.first_divergence == "encoder"
    assert report.same_checkpoint is False
    failing = {stage.name for stage in report.stages if not stage.isolated.passed}
    assert failing == {"encoder", "connector", "text_encoder", "matcher"}


def test_checkpoints_of_another_kind_are_refused(
    score_bundle: GetPath, score_checkpoint: GetPath, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"was made from a CLIPModel, .* is a SiglipModel; give the checkpoint"):
        check_score_parity(score_bundle("clip"), score_checkpoint("siglip"))
    odd = write_score_checkpoint(tmp_path / "odd", "clip-odd")
    with pytest.raises(InputError, match=r"are of different sizes \(inputs or outputs of encoder differ\)"):
        check_score_parity(score_bundle("clip"), odd)


def test_a_row_is_what_it_is_alone(scorer: Scorer) -> None:
    """Neither the other rows of a batch nor the padding that they bring change a score."""
    images = pictures(3)
    whole = scorer.score(images, TEXTS)
    for i, image in enumerate(images):
        for t, text in enumerate(TEXTS):
            alone = scorer.score(image, text)
            assert alone.cosine[0, 0] == pytest.approx(whole.cosine[i, t], abs=2e-6)
            if whole.match_logits is not None and alone.match_logits is not None:
                assert alone.match_logits[0, 0] == pytest.approx(whole.match_logits[i, t], abs=1e-5)


def test_more_rows_than_a_stage_takes(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"a photo of {number} shapes" for number in range(70)]
    features = scorer.text_features(texts)
    assert features.shape[0] == 70
    assert np.allclose(features[64:], scorer.text_features(texts[64:]), atol=2e-6)
    assert np.allclose(np.linalg.norm(features, axis=-1), 1, atol=1e-6)
    images = [pictures(1)[0]] * 65
    assert scorer.image_features(images).shape[0] == 65
    expected = scorer.score(pictures(2), texts[:3]).probabilities
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 4)
    assert np.allclose(np.asarray(scorer.score(pictures(2), texts[:3]).probabilities), np.asarray(expected), atol=1e-6)


def test_probabilities(scorer: Scorer, name: str) -> None:
    scores = scorer.score(pictures(2), TEXTS)
    assert scores.cosine.shape == (2, 3)
    assert np.abs(scores.cosine).max() <= 1 + 1e-6
    assert scores.probabilities is not None
    if name == "clip":
        assert np.allclose(scores.probabilities.sum(axis=1), 1, atol=1e-6)
    assert ((scores.probabilities >= 0) & (scores.probabilities <= 1)).all()
    assert (scores.logits is None) == (name == "retrieval")
    assert (scores.match_logits is None) == (name != "retrieval")
    stages = [stage.contract.name for stage in scorer.bundle.manifest.stages]
    assert list(scores.timings_ms) == ["preprocess", *stages, "total"]
    assert min(scores.timings_ms.values()) > 0


def test_which_pairs_the_matcher_reads(score_bundle: GetPath) -> None:
    images = pictures(3)
    with Scorer.load(score_bundle("retrieval"), threads=1) as scorer:
        every = scorer.score(images, TEXTS).probabilities
        assert every is not None
        assert not np.isnan(every).any()
        assert scorer.score(images, TEXTS, match="none").probabilities is None
        paired = scorer.score(images, TEXTS, match="paired").probabilities
        assert paired is not None
        assert (~np.isnan(paired) == np.eye(3, dtype=bool)).all()
        assert np.allclose(paired.diagonal(), every.diagonal(), atol=1e-6)
        best = scorer.score(images, TEXTS, match=2)
        assert best.probabilities is not None
        order = np.argsort(-best.cosine, axis=1)
        asked = ~np.isnan(best.probabilities)
        assert all(set(np.flatnonzero(asked[i])) == set(order[i, :2]) for i in range(3))
        for match in ("some", 0, -1, True, 1.5):
            with pytest.raises(InputError, match="accepted are all, paired, none and a whole number from 1 up"):
                scorer.score(images, TEXTS, match=match)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="'paired' for 3 pictures and 2 texts; give as many of each"):
            scorer.score(images, TEXTS[:2], match="paired")
    with (
        Scorer.load(score_bundle("clip"), threads=1) as clip,
        pytest.raises(InputError, match="match is 'all', but this bundle has no matcher; leave it out"),
    ):
        clip.score(images, TEXTS, match="all")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no text came; give at least one"),
        (["a", ""], "text 2 is empty"),
        ([" \n"], "text 1 is empty"),
        (["a", 3], "text 2 is a int; accepted is a string"),
        (None, "texts came as a NoneType; accepted is a list of strings"),
        (["\ud800"], "text 1 is not valid Unicode"),
    ],
)
def test_texts_that_are_refused(score_bundle: GetPath, texts: Any, message: str) -> None:
    with Scorer.load(score_bundle("clip"), threads=1) as scorer, pytest.raises(InputError, match=message):
        scorer.score(pictures(1), texts)


def test_texts_without_a_token_or_an_embedding(score_bundle: GetPath) -> None:
    with (
        Scorer.load(score_bundle("siglip"), threads=1) as scorer,
        pytest.raises(InputError, match=r"text 1 \('!!!'\) has no token that the model reads"),
    ):
        scorer.text_features("!!!")
    narrow = changed(score_bundle("clip"), text_vocab_size=300)
    with (
        Scorer.load(narrow, threads=1) as scorer,
        pytest.raises(InputError, match=r"text 1 holds 'photo</w>', token \d+, .* embeddings for 300 only"),
    ):
        scorer.text_features("photo")


def test_a_long_text_is_cut_and_told(scorer: Scorer) -> None:
    limit = scorer.contract.text.max_length
    scores = scorer.score(pictures(1), ["one", "a red circle " * limit])
    assert scores.truncated == (False, True)
    assert scores.tokens[1] > limit
    tokens = scorer.tokenize(["a red circle " * limit])
    assert tokens.input_ids.shape == (1, limit)
    trailing = scorer.contract.text.trailing_ids
    assert tuple(tokens.input_ids[0, limit - len(trailing) :]) == trailing


def test_pictures_that_are_refused(scorer: Scorer, tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    pictures(1)[0].save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:200])
    for images, message in (
        ([], "no picture came; give at least one"),
        ([tmp_path / "none.png"], "does not exist; name a picture file"),
        ([whole, cut], "cannot be decoded"),
        ([np.zeros((4, 4, 3))], "a picture is a ndarray; accepted is a path or a Pillow picture"),
    ):
        with pytest.raises(InputError, match=message):
            scorer.score(images, "one")  # type: ignore[arg-type]


def test_any_picture_of_any_shape(scorer: Scorer) -> None:
    odd = [
        Image.new(mode, size) for mode, size in (("1", (1, 1)), ("CMYK", (3, 90)), ("LA", (201, 7)), ("P", (37, 53)))
    ]
    assert np.isfinite(scorer.score(odd, "one").cosine).all()


def test_each_kind_of_bundle_has_its_own_class(score_bundle: GetPath) -> None:
    path = score_bundle("clip")
    with pytest.raises(InputError, match=r"scores pictures against texts \(clip\) and generates none; use `bridgeport"):
        Pipeline.load(path)
    loaded = Bundle.load(path)
    generating = Bundle(loaded.path, loaded.manifest.model_copy(update={"score": None}))
    with pytest.raises(InputError, match=r"generates text and scores nothing .* use `bridgeport run`"):
        Scorer.load(generating)
    with pytest.raises(BundleError, match="does not exist"):
        Scorer.load(path / "nowhere")


SCRIPT = """
import json, sys

class Blocker:
    names = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "sentencepiece", "safetensors",
             "huggingface_hub", "google"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
from bridgeport.cli import main
sys.exit(main(["score", *sys.argv[1:]]))
"""


def test_without_torch_and_sentencepiece(score_bundle: GetPath, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    pictures(1)[0].save(picture)
    words = [str(score_bundle("siglip")), "--image", str(picture), "--text", "a red circle", "--threads", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    with Scorer.load(score_bundle("siglip"), threads=1) as scorer:
        expected = scorer.score(picture, "a red circle")
    (pair,) = json.loads(done.stdout)["scores"]
    assert pair["cosine"] == pytest.approx(float(expected.cosine[0, 0]), abs=1e-6)
