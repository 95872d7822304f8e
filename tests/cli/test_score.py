"""`bridgeport score`, and what the other verbs say to a bundle that scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.runtime.generation import pictures

from bridgeport.cli import main
from bridgeport.runtime.score import Scorer

GetPath = Callable[[str], Path]
Captured = pytest.CaptureFixture[str]

TEXTS = ["a photo of a red circle", "two [blue] squares"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("pictures")
    paths = [directory / f"{index}.png" for index in range(2)]
    for path, picture in zip(paths, pictures(2), strict=True):
        picture.save(path)
    return [str(path) for path in paths]


def score(bundle: Path, files: list[str], *options: str, texts: list[str] | None = None) -> int:
    words = [word for file in files for word in ("--image", file)]
    words += [word for text in (TEXTS if texts is None else texts) for word in ("--text", text)]
    return main(["score", str(bundle), *words, "--threads", "1", *options])


@pytest.mark.parametrize(
    "name", ["retrieval", pytest.param("clip", marks=pytest.mark.slow), pytest.param("siglip", marks=pytest.mark.slow)]
)
def test_json(score_bundle: GetPath, files: list[str], name: str, capsys: Captured) -> None:
    assert score(score_bundle(name), files, "--json") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert [(pair["image"], pair["text"]) for pair in document["scores"]] == [
        (file, text) for file in files for text in TEXTS
    ]
    with Scorer.load(score_bundle(name), threads=1) as scorer:
        expected = scorer.score(files, TEXTS)
    assert expected.probabilities is not None
    for index, pair in enumerate(document["scores"]):
        i, t = divmod(index, 2)
        assert pair["cosine"] == pytest.approx(float(expected.cosine[i, t]), abs=1e-6)
        assert pair["probability"] == pytest.approx(float(expected.probabilities[i, t]), abs=1e-6)
        assert (pair["logit"] is None) == (name == "retrieval")
        assert pair["tokens"] == expected.tokens[t]
        assert pair["truncated"] == expected.truncated[t]
    stages = ["preprocess", "encoder", "connector", "text_encoder", "matcher", "total"]
    assert list(document["timings_ms"]) == [stage for stage in stages if stage != "matcher" or name == "retrieval"]
    assert "text_encoder" in err


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("retrieval", ("contrast", "match")),
        ("clip", ("cosine", "logit", "of these texts")),
        ("siglip", ("cosine", "logit", "of this pair")),
    ],
)
def test_table(score_bundle: GetPath, files: list[str], name: str, columns: tuple[str, ...], capsys: Captured) -> None:
    assert score(score_bundle(name), files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(column in lines[1] for column in ("picture", "text", *columns))
    assert sum("two [blue] squares" in line for line in lines) == 2
    assert sum("%" in line for line in lines) == 4


def test_match(score_bundle: GetPath, files: list[str], capsys: Captured) -> None:
    asked = {}
    for match in ("paired", "none", "1"):
        assert score(score_bundle("retrieval"), files, "--match", match, "--json") == 0
        pairs = json.loads(capsys.readouterr().out)["scores"]
        asked[match] = [pair["probability"] is not None for pair in pairs]
    assert asked["paired"] == [True, False, False, True]
    assert asked["none"] == [False] * 4
    assert (sum(asked["1"][:2]), sum(asked["1"][2:])) == (1, 1)
    assert score(score_bundle("retrieval"), files, "--match", "none") == 0
    assert "match" not in capsys.readouterr().out


def test_a_cut_text_is_told(score_bundle: GetPath, files: list[str], capsys: Captured) -> None:
    assert score(score_bundle("clip"), files[:1], "--json", texts=["a circle " * 40]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["scores"][0]["truncated"] is True
    assert "tokens, the model reads 24; the rest is cut off" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--text", ""], "text 1 is empty"),
        (["--text", "a", "--match", "some"], "match is 'some'; accepted are all, paired, none"),
        (["--text", "a", "--match", "0"], "match is 0; accepted are"),
        (["--text", "a", "--device", "tpu"], "device 'tpu' is unknown"),
        ([], "Missing option '--text'"),
    ],
)
def test_bad_usage(score_bundle: GetPath, files: list[str], options: list[str], says: str, capsys: Captured) -> None:
    assert main(["score", str(score_bundle("retrieval")), "--image", files[0], *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_a_picture_is_needed_and_must_be_one(score_bundle: GetPath, tmp_path: Path, capsys: Captured) -> None:
    bundle = str(score_bundle("clip"))
    assert main(["score", bundle, "--text", "a"]) == 2
    assert "Missing option '--image'" in capsys.readouterr().err
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert main(["score", bundle, "--text", "a", "--image", str(broken)]) == 2
    assert str(broken) in capsys.readouterr().err


def test_other_verbs_answer_clearly(score_bundle: GetPath, files: list[str], capsys: Captured) -> None:
    bundle = str(score_bundle("clip"))
    assert main(["inspect", bundle]) == 0
    shown = capsys.readouterr().out
    assert "text_encoder" in shown
    assert "softmax" in shown
    assert main(["inspect", bundle, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"]["methods"] == ["softmax"]
    for words in (["run", bundle, "--image", files[0]], ["bench", bundle]):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "bridgeport score" in err, words
        assert len(err.strip().splitlines()) == 1


def test_parity(score_bundle: GetPath, score_checkpoint: GetPath, files: list[str], capsys: Captured) -> None:
    words = ["--reference", str(score_checkpoint("siglip")), "--image", files[0], "--prompt", "a red circle"]
    assert main(["parity", str(score_bundle("siglip")), *words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"]
    assert [stage["name"] for stage in document["stages"]][-2:] == ["scores", "probabilities"]
    assert main(["parity", str(score_bundle("siglip")), *words]) == 0
    assert "PASSED" in capsys.readouterr().out
