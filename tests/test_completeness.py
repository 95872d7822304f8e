"""No family in the registry without parity, an export that is checked at three sizes, and an entry in the docs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from bridgeport.export.checks import BATCH_SIZES, check_sizes
from bridgeport.models.contract import Axis, StageContract, TensorSpec
from bridgeport.models.families import FAMILIES
from bridgeport.models.registry import _built_in
from bridgeport.runtime.parity.taps import TAPS

ROOT = Path(__file__).resolve().parents[1]
DOCS = (ROOT / "docs" / "connectors.md").read_text(encoding="utf-8")
SCORES = ("blip-2-retrieval", "clip", "siglip")


@dataclass(frozen=True)
class Proof:
    """Of one architecture: its kind, and the test that takes checkpoints of `writer` through export, run and parity.

    `case`: what that test says where a writer makes several architectures.
    """

    kind: str
    file: str
    writer: str
    case: str = ""


PROOFS = {
    "Blip2ForConditionalGeneration": Proof("blip-2", "tests/runtime/test_parity.py", "write_blip2_checkpoint"),
    "Blip2ForImageTextRetrieval": Proof(
        "blip-2-retrieval", "tests/runtime/test_score.py", "write_score_checkpoint", case='"retrieval"'
    ),
    "CLIPModel": Proof("clip", "tests/runtime/test_score.py", "write_score_checkpoint", case='"clip"'),
    "SiglipModel": Proof("siglip", "tests/runtime/test_score.py", "write_score_checkpoint", case='"siglip"'),
    "LlavaForConditionalGeneration": Proof("llava", "tests/runtime/test_llava.py", "write_llava_checkpoint"),
    "LlavaNextForConditionalGeneration": Proof(
        "llava-next", "tests/runtime/test_llava.py", "write_llava_checkpoint", case="anyres="
    ),
    "LlavaOnevisionForConditionalGeneration": Proof(
        "llava-onevision", "tests/runtime/test_families.py", "write_llava_onevision_checkpoint"
    ),
    "LlavaNextVideoForConditionalGeneration": Proof(
        "llava-next-video", "tests/runtime/test_families.py", "write_llava_next_video_checkpoint"
    ),
    "QWenLMHeadModel": Proof("qwen-vl", "tests/runtime/test_families.py", "write_qwen_vl_checkpoint"),
    "Qwen2VLForConditionalGeneration": Proof(
        "qwen2-vl",
        "tests/runtime/test_families.py",
        "write_qwen2_vl_checkpoint",
        case='write_qwen2_vl_checkpoint(path, "2"',
    ),
    "Qwen2_5_VLForConditionalGeneration": Proof(
        "qwen2.5-vl",
        "tests/runtime/test_families.py",
        "write_qwen2_vl_checkpoint",
        case='write_qwen2_vl_checkpoint(path, "2.5"',
    ),
    "IdeficsForVisionText2Text": Proof("flamingo", "tests/runtime/test_flamingo.py", "write_idefics_checkpoint"),
    "Idefics2ForConditionalGeneration": Proof(
        "idefics2", "tests/runtime/test_families.py", "write_idefics2_checkpoint"
    ),
    "Idefics3ForConditionalGeneration": Proof(
        "idefics3", "tests/runtime/test_families.py", "write_idefics3_checkpoint"
    ),
    "SmolVLMForConditionalGeneration": Proof(
        "smolvlm", "tests/runtime/test_families.py", "write_idefics3_checkpoint", case="smol=True"
    ),
    "InternVLForConditionalGeneration": Proof(
        "internvl", "tests/runtime/test_families.py", "write_internvl_checkpoint"
    ),
    "InstructBlipForConditionalGeneration": Proof(
        "instructblip", "tests/runtime/test_instructblip.py", "write_instructblip_checkpoint"
    ),
    "InstructBlipVideoForConditionalGeneration": Proof(
        "instructblip-video", "tests/runtime/test_instructblip.py", "write_instructblip_checkpoint", case="video=True"
    ),
}

# Connectors of this package that no class of transformers has, by the name that config.json gives them.
CONNECTOR_PROOFS = {
    "simplified-qformer": Proof(
        "llava", "tests/export/test_simplified_qformer.py", "write_llava_checkpoint", case='"simplified-qformer"'
    ),
}


def architectures() -> list[str]:
    return [name for family in FAMILIES.values() for name in family.layouts]


def test_every_architecture_of_the_registry_has_its_proof() -> None:
    assert set(PROOFS) == set(architectures())
    assert {proof.kind for proof in PROOFS.values()} == set(TAPS) | set(SCORES), (
        "a kind without parity, or without proof"
    )


def test_every_connector_of_the_package_has_its_proof() -> None:
    assert set(CONNECTOR_PROOFS) == set(_built_in())


@pytest.mark.parametrize("name", [*architectures(), *_built_in()])
def test_proof_and_docs(name: str) -> None:
    proof = (PROOFS | CONNECTOR_PROOFS)[name]
    text = (ROOT / proof.file).read_text(encoding="utf-8")
    conftest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    assert "parity(" in text, f"{proof.file} holds nothing against transformers"
    assert proof.writer in text + conftest, f"{proof.file} makes no checkpoint of {name}"
    assert proof.case in text, f"{proof.file} has no case for {name}: {proof.case}"
    assert f"`{name}`" in DOCS, f"docs/connectors.md does not name {name}"


def test_every_row_of_the_docs_says_what_when_how_many_tokens_and_at_what_cost() -> None:
    titles = re.findall(r"^## (.*)$", DOCS, flags=re.MULTILINE)
    texts = dict(zip(titles, re.split(r"^## .*$", DOCS, flags=re.MULTILINE)[1:], strict=True))
    sections = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-"): text for title, text in texts.items()}
    rows = re.findall(r"^\| (\[.*?\)) \| (.*?) \| (.*?) \|", DOCS, flags=re.MULTILINE)
    assert {name for _, classes, _ in rows for name in re.findall(r"`(\w+)`", classes)} >= set(architectures())
    for links, _, tokens in rows:
        for anchor in re.findall(r"\(#(.*?)\)", links):
            text = sections[anchor].lower()
            for words in (("choose",), ("cost",), ("tokens", "vectors per picture")):
                found = any(word in text for word in words)
                assert found, f"docs/connectors.md: the section of {links} says nothing of {words[0]!r}"
        assert re.search(r"\d", tokens), f"docs/connectors.md: the row of {links} has no number of tokens"


def test_an_export_is_checked_at_three_sizes() -> None:
    """The sizes are the same for every stage: they come from its contract."""
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 2))
    axis = Axis(name="batch", min=1, opt=1, max=8)
    contract = StageContract(name="connector", inputs=(spec,), outputs=(spec,), axes=(axis,))
    sizes = [setting["batch"] for setting in check_sizes(contract)]
    assert sizes == list(BATCH_SIZES)
    assert len(set(sizes)) == 3
    # Patches in groups (Qwen2-VL) have no batch.
    groups = contract.model_copy(update={"axes": (Axis(name="tokens", min=1, opt=64, max=1024),)})
    assert len({setting["tokens"] for setting in check_sizes(groups)}) == 3
