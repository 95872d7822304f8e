"""No family in the registry without parity, an export that is checked at three sizes, and an entry in the docs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from bridgeport.export.checks import BATCH_SIZES, check_sizes
from bridgeport.models.contract import Axis, StageContract, TensorSpec
from bridgeport.models.families import FAMILIES
from bridgeport.runtime.parity.taps import TAPS

ROOT = Path(__file__).resolve().parents[1]
DOCS = (ROOT / "docs" / "connectors.md").read_text(encoding="utf-8")
SCORES = ("blip-2-retrieval", "clip", "siglip")


@dataclass(frozen=True)
class Proof:
    """Of one architecture: its kind, and the test that takes checkpoints of `writer` through export, run and parity."""

    kind: str
    file: str
    writer: str


PROOFS = {
    "Blip2ForConditionalGeneration": Proof("blip-2", "tests/runtime/test_parity.py", "write_blip2_checkpoint"),
    "Blip2ForImageTextRetrieval": Proof("blip-2-retrieval", "tests/runtime/test_score.py", "write_score_checkpoint"),
    "CLIPModel": Proof("clip", "tests/runtime/test_score.py", "write_score_checkpoint"),
    "SiglipModel": Proof("siglip", "tests/runtime/test_score.py", "write_score_checkpoint"),
    "LlavaForConditionalGeneration": Proof("llava", "tests/runtime/test_llava.py", "write_llava_checkpoint"),
    "LlavaNextForConditionalGeneration": Proof("llava-next", "tests/runtime/test_llava.py", "write_llava_checkpoint"),
    "LlavaOnevisionForConditionalGeneration": Proof(
        "llava-onevision", "tests/runtime/test_families.py", "write_llava_onevision_checkpoint"
    ),
    "LlavaNextVideoForConditionalGeneration": Proof(
        "llava-next-video", "tests/runtime/test_families.py", "write_llava_next_video_checkpoint"
    ),
    "QWenLMHeadModel": Proof("qwen-vl", "tests/runtime/test_families.py", "write_qwen_vl_checkpoint"),
    "Qwen2VLForConditionalGeneration": Proof("qwen2-vl", "tests/runtime/test_families.py", "write_qwen2_vl_checkpoint"),
    "Qwen2_5_VLForConditionalGeneration": Proof(
        "qwen2.5-vl", "tests/runtime/test_families.py", "write_qwen2_vl_checkpoint"
    ),
    "IdeficsForVisionText2Text": Proof("flamingo", "tests/runtime/test_flamingo.py", "write_idefics_checkpoint"),
    "Idefics2ForConditionalGeneration": Proof(
        "idefics2", "tests/runtime/test_families.py", "write_idefics2_checkpoint"
    ),
    "Idefics3ForConditionalGeneration": Proof(
        "idefics3", "tests/runtime/test_families.py", "write_idefics3_checkpoint"
    ),
    "SmolVLMForConditionalGeneration": Proof("smolvlm", "tests/runtime/test_families.py", "write_idefics3_checkpoint"),
    "InternVLForConditionalGeneration": Proof(
        "internvl", "tests/runtime/test_families.py", "write_internvl_checkpoint"
    ),
    "InstructBlipForConditionalGeneration": Proof(
        "instructblip", "tests/runtime/test_instructblip.py", "write_instructblip_checkpoint"
    ),
    "InstructBlipVideoForConditionalGeneration": Proof(
        "instructblip-video", "tests/runtime/test_instructblip.py", "write_instructblip_checkpoint"
    ),
}


def architectures() -> list[str]:
    return [name for family in FAMILIES.values() for name in family.layouts]


def test_every_architecture_of_the_registry_has_its_proof() -> None:
    assert set(PROOFS) == set(architectures())
    assert {proof.kind for proof in PROOFS.values()} == set(TAPS) | set(SCORES), (
        "a kind without parity, or without proof"
    )


@pytest.mark.parametrize("name", architectures())
def test_proof_and_docs(name: str) -> None:
    proof = PROOFS[name]
    text = (ROOT / proof.file).read_text(encoding="utf-8")
    conftest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    assert "parity(" in text, f"{proof.file} holds nothing against transformers"
    assert proof.writer in text + conftest, f"{proof.file} makes no checkpoint of {name}"
    assert f"`{name}`" in DOCS, f"docs/connectors.md does not name {name}"


def test_an_export_is_checked_at_three_sizes() -> None:
    """The sizes are the same for every stage: they come from its contract."""
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 2))
    axis = Axis(name="batch", min=1, opt=1, max=8)
    contract = StageContract(name="connector", inputs=(spec,), outputs=(spec,), axes=(axis,))
    sizes = [setting["batch"] for setting in check_sizes(contract)]
    assert sizes == list(BATCH_SIZES)
    assert len(set(sizes)) == 3
