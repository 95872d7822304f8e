"""Flamingo from export to text: pictures among the words of a prompt, equal to transformers token for token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.checkpoints_idefics import FAKE_TOKEN, IDEFICS_CONFIGS, write_idefics_checkpoint
from transformers import IdeficsForVisionText2Text

from bridgeport.bundle import Bundle
from bridgeport.errors import EngineError, ExportError, InputError, UnsupportedError
from bridgeport.export import checkpoint as export
from bridgeport.export.checkpoint_processor import load_processor
from bridgeport.export.idefics_processor import freeze_flamingo, freeze_idefics, prompt_items
from bridgeport.export.llm.flamingo import export_flamingo_decoder
from bridgeport.export.llm.flamingo_check import check_flamingo_decoder, make_flamingo_batches
from bridgeport.export.processor import freeze_generation
from bridgeport.models import load_checkpoint
from bridgeport.models.idefics import flamingo_contract
from bridgeport.runtime import Pipeline, check_parity
from bridgeport.runtime import flamingo as flamingo_module
from bridgeport.runtime.engine import Engine
from bridgeport.runtime.flamingo import MASK, ImageMemory, read_images, visible_images

NEW_TOKENS = 10
# Every stage within that part of its scale; observed is 5e-6.
STAGE_TOLERANCE = 5e-5
IMAGE, END = 9, 2
# Pictures of each row by index, the rows' prompts, and whether the prompts say where pictures stand.
BATCHES: dict[str, tuple[list[list[int]] | None, list[str], bool]] = {
    "one": ([[0]], ["what?"], False),
    "three-interleaved": ([[0, 1, 2]], ["x {image} y {image} and {image} z"], True),
    "text-only": (None, ["hello"], False),
    "ragged": (
        [[0, 1], [], [2, 0, 1]],
        ["q {image}{image} w", "plain text that is longer than", "{image} one</s>two {image} {image}"],
        True,
    ),
    "in-front": ([[0, 1], [2], [2, 1, 0]], ["tell me", "  me too ", ""], False),
}


def pictures() -> list[Image.Image]:
    """Noise of odd sizes."""
    random = np.random.default_rng(0)
    sizes = ((40, 90), (33, 12), (64, 64))
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def write_bundle(checkpoint: Path, out: Path, **options: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "lint_stages", lambda *_: None)  # takes half the time, and has tests of its own
        return export.export_checkpoint(checkpoint, out, **options).path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Checkpoint and bundle; do not change them."""
    directory = tmp_path_factory.mktemp("small")
    checkpoint = write_idefics_checkpoint(directory / "checkpoint", **IDEFICS_CONFIGS["small"])
    return checkpoint, write_bundle(checkpoint, directory / "bundle")


@pytest.fixture(scope="module")
def pipeline(small: tuple[Path, Path]) -> Pipeline:
    return Pipeline.load(small[1], threads=1)


class Transformers:
    """The checkpoint as transformers runs it."""

    def __init__(self, checkpoint: Path) -> None:
        make: Any = IdeficsForVisionText2Text
        self.model = make.from_pretrained(checkpoint).eval()
        self.processor = load_processor(checkpoint)
        self.processor.tokenizer.padding_side = "left"  # what `generate` asks for

    def generate(self, groups: Sequence[Sequence[Any]], prompts: Sequence[str], interleave: bool) -> list[list[int]]:
        """Greedy tokens per row, in one padded batch, those after a row's end cut off."""
        items = [
            list(prompt_items(text, group, interleave=interleave)) for text, group in zip(prompts, groups, strict=True)
        ]
        inputs = self.processor(text=items, return_tensors="pt")
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(END) + 1] if END in row else row for row in rows]


def assert_tokens_equal(pipeline: Pipeline, reference: Transformers, batch: str) -> None:
    groups, prompts, interleave = BATCHES[batch]
    images = None if groups is None else [[pictures()[i] for i in group] for group in groups]
    got: Any = pipeline.generate(images, prompts, interleave=interleave, max_new_tokens=NEW_TOKENS)
    want = reference.generate(images or [[]], prompts, interleave)
    assert [list(row.token_ids) for row in got] == want


def assert_parity(bundle: Path, checkpoint: Path) -> None:
    report = check_parity(bundle, checkpoint, threads=1, max_new_tokens=8)
    assert report.passed
    worst = {
        stage.name: max(one.max_abs for run in stage.runs.values() for one in run.cases.values())
        for stage in report.stages
    }
    assert set(worst) >= {"pixels", "placeholder_ids", "encoder", "connector", "first_logits", "tokens"}
    assert max(worst.values()) <= STAGE_TOLERANCE, worst


@pytest.fixture(scope="module")
def reference(small: tuple[Path, Path]) -> Transformers:
    return Transformers(small[0])


@pytest.mark.parametrize("batch", BATCHES)
def test_tokens_equal_transformers(pipeline: Pipeline, reference: Transformers, batch: str) -> None:
    assert_tokens_equal(pipeline, reference, batch)


def test_stages_equal_transformers(small: tuple[Path, Path]) -> None:
    assert_parity(small[1], small[0])


def test_parity_sees_a_token_that_looks_at_the_wrong_picture(
    small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flamingo_module, "visible_images", lambda ids, images, **_: np.zeros((len(ids), images), int))
    report = check_parity(small[1], small[0], threads=1, max_new_tokens=2)
    failed = {stage.name for stage in report.stages if not stage.passed}
    assert "first_logits" in failed
    assert not failed & {"pixels", "placeholder_ids", "encoder", "connector", "merged_embeddings"}


def test_pictures_are_read_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    run = Engine.run

    def note(self: Engine, *args: Any, **options: Any) -> Any:
        runs.append(self.contract.name)
        return run(self, *args, **options)

    monkeypatch.setattr(Engine, "run", note)
    pipeline.generate([pictures()[:2]], "who?", max_new_tokens=5, ignore_eos=True)
    assert runs == ["encoder", "connector", "embed_tokens", "cross_kv", "llm"]


def test_order_of_pictures_matters(pipeline: Pipeline) -> None:
    """Else the tests above would pass with pictures mixed up."""
    first, second, _ = pictures()
    prompt = "x {image} y {image} z"
    prepared = [pipeline.prepare([pair], prompt, interleave=True) for pair in ([first, second], [second, first])]
    logits = []
    for one in prepared:
        embeds = pipeline.vision.encode(one.pictures[0])
        features = [np.concatenate([rows[0] for rows in pipeline.vision.connect(one.pictures[0], embeds)])]
        inputs_embeds, lengths = pipeline.merge(one, features)
        logits.append(pipeline.prefill_logits(inputs_embeds, lengths, pipeline.step_inputs(one, lengths, features)))
    assert np.abs(logits[0] - logits[1]).max() > 1e-2 * np.abs(logits[0]).max()


def test_prompt_has_pictures_between_boundaries(pipeline: Pipeline) -> None:
    def spell(images: Any, prompt: str, interleave: bool) -> str:
        ids = pipeline.prepare(images, prompt, interleave=interleave).input_ids[0].tolist()
        text: str = pipeline.tokenizer.decode(ids, skip_special_tokens=False)
        return text.replace(pipeline.prompt.placeholder, "@").replace(FAKE_TOKEN, "|")

    a, b, c = pictures()
    assert spell([[a, b]], " who ", False) == "<s>|@|@|who"
    assert spell([[a, b, c]], "x {image} y {image} {image}", True) == "<s>x|@|y|@|@|"
    assert spell(None, " <image> ", False) == "<s><image>"


def test_user_text_is_no_picture(pipeline: Pipeline) -> None:
    prepared = pipeline.prepare([pictures()[:1]], "<image> is text")
    assert [len(at) for at in prepared.image_positions] == [1]
    with pytest.raises(InputError, match=r"has 1 \{image\} marks and 2 pictures"):
        pipeline.prepare([pictures()[:2]], "{image}", interleave=True)


def test_visible_images_golden() -> None:
    """Of "a b <image><image> c <image><image></s> d <image>", as written down in Flamingo's section 3.1.3."""
    ids = np.array([5, 6, IMAGE, IMAGE, 7, IMAGE, IMAGE, END, 8, IMAGE])
    want = [[0, 0], [0, 0], [1, 0], [0, 1], [0, 1]]
    found = visible_images(ids[:5], 2, image_token_id=IMAGE, end_of_document_id=END)
    assert found.tolist() == want
    last = visible_images(ids, 5, image_token_id=IMAGE, end_of_document_id=END).argmax(axis=1).tolist()
    assert last == [0, 0, 0, 1, 1, 2, 3, 3, 0, 4]
    sums = visible_images(ids, 5, image_token_id=IMAGE, end_of_document_id=END).sum(axis=1).tolist()
    assert sums == [0, 0, 1, 1, 1, 1, 1, 1, 0, 1]
    without = visible_images(ids, 5, image_token_id=IMAGE, end_of_document_id=None)
    assert without.sum(axis=1).tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]


def test_answers_see_what_the_last_token_sees(pipeline: Pipeline) -> None:
    contract = pipeline.manifest.flamingo
    assert contract is not None
    token, latents = pipeline.prompt.image_token_id, contract.latents
    width = int(pipeline.engines["connector"].contract.outputs[0].shape[-1])
    rows = [np.array([1, token, 5, token, 6]), np.array([1, 5, 6]), np.array([1, token, END, 5])]
    features = [np.ones((count * latents, width), np.float32) for count in (2, 0, 1)]
    memory = read_images(pipeline.engines["cross_kv"], contract, rows, token, features)
    assert memory.prompts.shape == (3, 5, 2)
    assert memory.answers[:, 0].tolist() == [[0, 1], [0, 0], [0, 0]]
    assert all(memory.step()[name] is memory.step()[name] for name in memory.step())
    assert memory.step()[MASK] is not memory.prefill()[MASK]
    assert isinstance(memory, ImageMemory)
    with pytest.raises(EngineError, match=r"prompt 0 has 2 image tokens"):
        read_images(pipeline.engines["cross_kv"], contract, rows[:1], token, features[2:])


def test_torch_engine_is_refused(small: tuple[Path, Path]) -> None:
    with pytest.raises(UnsupportedError, match="onnxruntime"):
        Pipeline.load(small[1], engine="torch", checkpoint=small[0])


def test_processor_that_departs_is_refused(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_checkpoint(small[0])
    generation = freeze_generation(model)
    freeze_idefics(model, tmp_path / "right", generation)
    monkeypatch.setattr("bridgeport.export.idefics_processor._SPACE", "")
    with pytest.raises(ExportError, match="tokenize"):
        freeze_idefics(model, tmp_path / "wrong", generation)
    monkeypatch.undo()
    contract = freeze_flamingo(model).model_copy(update={"end_of_document_id": None})
    monkeypatch.setattr("bridgeport.export.idefics_processor.freeze_flamingo", lambda _: contract)
    with pytest.raises(ExportError, match="image_attention_mask"):
        freeze_idefics(model, tmp_path / "masked", generation)


def test_other_number_of_latents_is_refused(small: tuple[Path, Path]) -> None:
    model = load_checkpoint(small[0])
    connector = model.contracts["connector"]
    output = connector.outputs[0].model_copy(update={"shape": ("batch", 3, connector.outputs[0].shape[2])})
    model.contracts["connector"] = connector.model_copy(update={"outputs": (output,)})
    with pytest.raises(UnsupportedError, match="gives 3 features for a picture, the checkpoint has 4 latents"):
        freeze_flamingo(model)


def test_export_check_sees_a_graph_of_other_weights(small: tuple[Path, Path]) -> None:
    """The check that every exported decoder goes through must be able to fail."""
    model, bundle = load_checkpoint(small[0]), Bundle.load(small[1])
    contract, cache = bundle.manifest.flamingo, bundle.manifest.kv_cache
    assert contract is not None
    assert cache is not None
    cross_kv, decoder = model.load_stage("cross_kv"), model.load_stage("llm")
    gate: Any = decoder.gated_cross_attn_layers[0].alpha_cross_attn  # type: ignore[index, union-attr]
    with torch.no_grad():
        gate.mul_(1.01)
    batches = make_flamingo_batches(cross_kv, decoder, contract)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="logits of the prompt"):
        check_flamingo_decoder(bundle.graph("llm"), batches, cache, contract, precision="fp32")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in IDEFICS_CONFIGS if name != "small"])
def test_every_shape(name: str, tmp_path: Path) -> None:
    checkpoint = write_idefics_checkpoint(tmp_path / "checkpoint", **IDEFICS_CONFIGS[name])
    bundle = write_bundle(checkpoint, tmp_path / "bundle")
    with Pipeline.load(bundle, threads=1) as pipeline:
        reference = Transformers(checkpoint)
        for batch in BATCHES:
            assert_tokens_equal(pipeline, reference, batch)
    assert_parity(bundle, checkpoint)


@pytest.mark.slow
def test_int4(tmp_path: Path) -> None:
    checkpoint = write_idefics_checkpoint(tmp_path / "checkpoint", **IDEFICS_CONFIGS["small"])
    bundle = Bundle.load(write_bundle(checkpoint, tmp_path / "bundle", precision="int4"))
    assert bundle.manifest.stage("llm").precision == "int4"
    assert bundle.manifest.stage("cross_kv").precision == "fp32"
    with Pipeline.load(bundle, threads=1) as pipeline:
        answer = pipeline.generate([pictures()], "x {image} y {image}{image}", interleave=True, max_new_tokens=4)
    assert answer[0].token_ids


@pytest.mark.slow
def test_graph_of_a_head_that_the_operator_does_not_turn(tmp_path: Path) -> None:
    """Rotary embeddings in the graph (head size 24) and in the operator (16) are the same function."""
    checkpoint = write_idefics_checkpoint(tmp_path / "checkpoint", **IDEFICS_CONFIGS["odd"])
    model, path = load_checkpoint(checkpoint), tmp_path / "decoder.onnx"
    contract, cache = flamingo_contract(model.config, END), model.kv_cache
    assert cache is not None
    assert cache.head_size % 16
    stage: Any = model.load_stage("llm")
    export_flamingo_decoder(stage, model.contracts["llm"], cache, contract, path, precision="fp32")
    batches = make_flamingo_batches(model.load_stage("cross_kv"), model.load_stage("llm"), contract)  # type: ignore[arg-type]
    assert check_flamingo_decoder(path, batches, cache, contract, precision="fp32")["max_abs"] < 1e-4
