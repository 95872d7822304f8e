"""What is frozen runs as the checkpoint's own processor does; what cannot be frozen is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoints import TEXT_CONFIGS, copy_of, write_blip2_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders
from transformers import AutoTokenizer, Blip2ForConditionalGeneration

from bridgeport.errors import BridgeportError, CheckpointError, ExportError, UnsupportedError
from bridgeport.export.checkpoint_processor import load_image_processor, load_processor
from bridgeport.export.processor import (
    check_frozen_processor,
    freeze_generation,
    freeze_image_processor,
    freeze_prompt,
    freeze_tokenizer,
)
from bridgeport.manifest import (
    ImageContract,
    ImageSegment,
    Normalize,
    PromptContract,
    Rescale,
    Resize,
    TextSegment,
    Whole,
)
from bridgeport.models import load_checkpoint
from bridgeport.runtime.processor import decode, load_tokenizer, tokenize_prompt

Checkpoints = Callable[[str], Path]


@dataclass
class Frozen:
    """All that is frozen of one checkpoint."""

    image: ImageContract
    prompt: PromptContract
    tokenizer: Path


def freeze(checkpoint: Path, directory: Path) -> Frozen:
    model = load_checkpoint(checkpoint)
    return Frozen(
        freeze_image_processor(checkpoint, model.config),
        freeze_prompt(model),
        freeze_tokenizer(checkpoint, directory, model.config.image_token_index),
    )


def check(checkpoint: Path, frozen: Frozen) -> dict[str, Any]:
    return check_frozen_processor(checkpoint, frozen.image, frozen.prompt, frozen.tokenizer)


@pytest.mark.parametrize("name", TEXT_CONFIGS)
def test_frozen_equals_the_checkpoints_own(blip2_checkpoint: Checkpoints, tmp_path: Path, name: str) -> None:
    report = check(blip2_checkpoint(name), freeze(blip2_checkpoint(name), tmp_path))
    assert report["image_max_abs"] <= 1e-6
    assert report["pictures"] >= 40
    assert report["prompts"] >= 9


def test_frozen_values_are_those_of_the_files(tmp_path: Path) -> None:
    path = write_blip2_checkpoint(
        tmp_path / "c", resample=2, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6), num_query_tokens=5
    )
    frozen = freeze(path, tmp_path)
    resize, rescale, normalize = frozen.image.steps
    assert resize == Resize(height=28, width=28, resample="bilinear")
    assert rescale == Rescale(factor=1 / 255)
    assert normalize == Normalize(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert frozen.prompt == PromptContract(
        segments=(ImageSegment(), TextSegment(add_special_tokens=True)),
        image_token_id=320,
        image_token="<image>",
        placeholder=frozen.prompt.placeholder,
    )
    assert frozen.image.tiling == Whole(tokens=5)
    assert check(path, frozen)["image_max_abs"] <= 1e-6


def test_no_normalisation_has_no_step(tmp_path: Path) -> None:
    path = write_blip2_checkpoint(tmp_path / "c", do_normalize=False)
    frozen = freeze(path, tmp_path)
    assert [step.op for step in frozen.image.steps] == ["resize", "rescale"]
    assert check(path, frozen)["image_max_abs"] <= 1e-6


def test_a_processor_that_takes_rgb_only(blip2_checkpoint: Checkpoints, tmp_path: Path) -> None:
    path = copy_of(blip2_checkpoint("llama"), tmp_path / "c")
    _image_processor(path, do_convert_rgb=False)
    assert check(path, freeze(path, tmp_path))["image_max_abs"] <= 1e-6


@pytest.mark.parametrize("slow_files", [False, True])
def test_the_files_of_older_transformers(blip2_checkpoint: Checkpoints, tmp_path: Path, slow_files: bool) -> None:
    """preprocessor_config.json, and a GPT-2 tokenizer that adds BOS by a flag, with or without tokenizer.json."""
    path = copy_of(blip2_checkpoint("opt"), tmp_path / "c")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokens = {t["id"]: {k: v for k, v in t.items() if k != "id"} for t in tokenizer["added_tokens"]}
    specials = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "added_tokens_decoder": tokens}
    (path / "tokenizer_config.json").write_text(json.dumps(specials | settings))
    if slow_files:
        (path / "tokenizer.json").unlink()
        (path / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
        merges = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
        (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    processor = json.loads((path / "processor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps(processor.pop("image_processor")))
    (path / "processor_config.json").write_text(json.dumps(processor))

    frozen, now = freeze(path, tmp_path), freeze(blip2_checkpoint("opt"), tmp_path / "now")
    assert check(path, frozen)["image_max_abs"] <= 1e-6
    # The placeholder's secret spelling follows from the tokenizer's file, which older releases wrote otherwise.
    assert frozen.image == now.image
    assert frozen.prompt == now.prompt.model_copy(update={"placeholder": frozen.prompt.placeholder})
    for text in ("", "a photo of", "<image>"):
        ours = tokenize_prompt(load_tokenizer(frozen.tokenizer), frozen.prompt, text, [(4,)])
        assert ours == tokenize_prompt(load_tokenizer(now.tokenizer), now.prompt, text, [(4,)])


def _step(frozen: Frozen, index: int, **changes: Any) -> None:
    steps = list(frozen.image.steps)
    steps[index] = steps[index].model_copy(update=changes)
    frozen.image = frozen.image.model_copy(update={"steps": tuple(steps)})


def _text_without_bos(frozen: Frozen) -> None:
    segments = (ImageSegment(), TextSegment(add_special_tokens=False))
    frozen.prompt = frozen.prompt.model_copy(update={"segments": segments})


def _text_first(frozen: Frozen) -> None:
    frozen.prompt = frozen.prompt.model_copy(update={"segments": frozen.prompt.segments[::-1]})


def _other_decoder(frozen: Frozen) -> None:
    tokenizer = Tokenizer.from_file(str(frozen.tokenizer))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(frozen.tokenizer))


# A planted fault -> the step that the error must name.
FAULTS: dict[str, tuple[Callable[[Frozen], object], str]] = {
    "filter": (lambda f: _step(f, 0, resample="bilinear"), "step resize of picture"),
    "height": (lambda f: _step(f, 0, height=27), "step resize of picture"),
    "factor": (lambda f: _step(f, 1, factor=1 / 256), "step rescale of picture"),
    "mean": (lambda f: _step(f, 2, mean=(0.5, 0.5, 0.5)), "step normalize of picture"),
    "a swapped channel": (lambda f: _step(f, 2, std=f.image.steps[2].std[::-1]), "step normalize of picture"),  # type: ignore[union-attr]
    "no normalisation": (
        lambda f: setattr(f, "image", f.image.model_copy(update={"steps": f.image.steps[:2]})),
        "a step is missing from the contract",
    ),
    "no BOS": (_text_without_bos, "tokenize: prompt '' with 1 pictures gives"),
    "order": (_text_first, "tokenize: prompt '' with 1 pictures gives"),
    "query count": (
        lambda f: setattr(f, "image", f.image.model_copy(update={"tiling": Whole(tokens=5)})),
        "tokenize: prompt '' with 1 pictures gives",
    ),
    "decoder": (_other_decoder, "decode: ids"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(blip2_checkpoint: Checkpoints, tmp_path: Path, name: str) -> None:
    plant, message = FAULTS[name]
    frozen = freeze(blip2_checkpoint("llama"), tmp_path)
    plant(frozen)
    with pytest.raises(ExportError, match=message) as caught:
        check(blip2_checkpoint("llama"), frozen)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_typed_placeholder_text_is_text(blip2_checkpoint: Checkpoints, tmp_path: Path, name: str, last: bool) -> None:
    path = copy_of(blip2_checkpoint(name), tmp_path / "c")
    original: Any = AutoTokenizer.from_pretrained(path)
    if not last:
        original.add_special_tokens({"additional_special_tokens": [AddedToken("<extra>", special=True)]})
        original.add_tokens(["plain-added"])
        original.save_pretrained(path)
    frozen = freeze(path, tmp_path)
    tokenizer = load_tokenizer(frozen.tokenizer)
    for text in ("<image>", " <image>", "a<image>b", "<image>" * 3, "<image"):
        encoded = tokenize_prompt(tokenizer, frozen.prompt, text, [(4,)])
        assert 320 not in encoded.input_ids[4:]
        assert decode(tokenizer, encoded.input_ids) == text
    # Every other token is where it was, and nothing about the text of the ids changes.
    assert {t: i for t, i in tokenizer.get_vocab().items() if i != 320} == {
        t: i for t, i in original.get_vocab().items() if t != "<image>"
    }
    if not last:
        assert tokenizer.encode("x<extra>plain-added", add_special_tokens=False).ids[-2:] == [321, 322]
    check(path, frozen)


def test_an_image_token_of_the_vocabulary(tmp_path: Path) -> None:
    """Trained in with the other special tokens, as id 3, it stays there and loses its text."""
    path = write_blip2_checkpoint(tmp_path / "c", image_token="first")
    frozen = freeze(path, tmp_path)
    assert frozen.prompt.image_token_id == 3
    tokenizer = load_tokenizer(frozen.tokenizer)
    original = AutoTokenizer.from_pretrained(path)
    assert tokenizer.get_vocab_size() == len(original)
    assert tokenizer.token_to_id("<image>") is None
    assert 3 not in tokenize_prompt(tokenizer, frozen.prompt, "a <image> b", [(4,)]).input_ids[4:]
    assert check(path, frozen)["image_max_abs"] <= 1e-6


def test_freezing_is_reproducible(blip2_checkpoint: Checkpoints, tmp_path: Path) -> None:
    one, two = (freeze_tokenizer(blip2_checkpoint("opt"), tmp_path / name, 320) for name in "ab")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("eos", [2, [2, 40, 41]])
def test_generation_is_what_transformers_generates_with(tmp_path: Path, eos: Any) -> None:
    path = write_blip2_checkpoint(tmp_path, text="opt", eos_token_id=eos, max_position_embeddings=96)
    # transformers reads this file and then generates with the language model's own settings.
    generation = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 77}))
    theirs: Any = Blip2ForConditionalGeneration.from_pretrained(path).language_model.generation_config
    ours = freeze_generation(load_checkpoint(path))
    assert list(ours.eos_token_ids) == ([eos] if isinstance(eos, int) else eos)
    assert theirs.eos_token_id == eos
    assert (ours.pad_token_id, ours.bos_token_id) == (theirs.pad_token_id, theirs.bos_token_id) == (1, 2)
    assert (ours.context_length, ours.vocab_size) == (96, 324)


def test_a_stop_token_outside_the_vocabulary(tmp_path: Path) -> None:
    path = write_blip2_checkpoint(tmp_path, eos_token_id=50118)
    with pytest.raises(CheckpointError, match="eos_token_id 50118 is not in the vocabulary of 324"):
        freeze_generation(load_checkpoint(path))


def _edit(path: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((path / name).read_text())
    change(document)
    (path / name).write_text(json.dumps(document))


def _image_processor(path: Path, **changes: Any) -> None:
    _edit(path, "processor_config.json", lambda d: d["image_processor"].update(changes))


def _drop_image_token(path: Path) -> None:
    def drop(document: dict[str, Any]) -> None:
        document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != "<image>"]

    _edit(path, "tokenizer.json", drop)


# What is wrong -> (how the checkpoint is spoilt, the error, what it says).
BAD: dict[str, tuple[Callable[[Path], object], type[BridgeportError], str]] = {
    "no image token": (_drop_image_token, CheckpointError, "the tokenizer has no image token: .* 320"),
    "no tokenizer": (
        lambda p: (p / "tokenizer.json").unlink(),
        CheckpointError,
        r"has no tokenizer \(none of tokenizer\.json",
    ),
    "corrupt tokenizer": (
        lambda p: (p / "tokenizer.json").write_text("{"),
        CheckpointError,
        "the tokenizer does not load",
    ),
    "no processor": (
        lambda p: (p / "processor_config.json").unlink(),
        CheckpointError,
        r"has no image processor \(none of processor_config\.json, preprocessor_config\.json\)",
    ),
    "corrupt processor": (
        lambda p: (p / "processor_config.json").write_text("{"),
        CheckpointError,
        "the image processor does not load",
    ),
    "size": (
        lambda p: _image_processor(p, size={"height": 56, "width": 28}),
        CheckpointError,
        "makes 56x28 pictures, the vision encoder takes 28x28",
    ),
    "std 0": (
        lambda p: _image_processor(p, image_std=[1, 0, 1]),
        CheckpointError,
        "image_std .* no channel may",
    ),
    "two means": (
        lambda p: _image_processor(p, image_mean=[1, 0]),
        CheckpointError,
        "image_mean has 2 entries",
    ),
    "filter": (lambda p: _image_processor(p, resample=9), CheckpointError, "resample 9 is unknown"),
    "aspect": (
        lambda p: _image_processor(p, size={"shortest_edge": 28}),
        UnsupportedError,
        r"size \{'shortest_edge': 28\} keeps the aspect ratio",
    ),
    "no resize": (lambda p: _image_processor(p, do_resize=False), UnsupportedError, "do_resize is false"),
    "pad": (lambda p: _image_processor(p, do_pad=True), UnsupportedError, "do_pad is true"),
    "crop": (
        lambda p: _image_processor(p, do_center_crop=True, crop_size={"height": 20, "width": 20}),
        CheckpointError,
        "makes 20x20 pictures, the vision encoder takes 28x28",
    ),
    "another class": (
        lambda p: _image_processor(p, image_processor_type="BeitImageProcessor"),
        UnsupportedError,
        "image processor BeitImageProcessor is not built; built are BlipImageProcessor",
    ),
    "query count": (
        lambda p: _edit(p, "processor_config.json", lambda d: d.update(num_query_tokens=9)),
        CheckpointError,
        "num_query_tokens 9, config.json has 4",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_frozen_is_named(blip2_checkpoint: Checkpoints, tmp_path: Path, name: str) -> None:
    spoil, kind, message = BAD[name]
    path = copy_of(blip2_checkpoint("llama"), tmp_path / "c")
    spoil(path)
    with pytest.raises(kind, match=message) as caught:
        freeze(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_code_of_a_processor_is_not_run(
    blip2_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """transformers would ask on the terminal and run it for a "y"."""
    checkpoint = copy_of(blip2_checkpoint("llama"), tmp_path / "checkpoint")
    for file in checkpoint.glob("*processor_config.json"):
        file.unlink()
    kinds = {"processor_class": "Theirs", "image_processor_type": "Theirs"}
    auto_map = {"AutoProcessor": "theirs.Theirs", "AutoImageProcessor": "theirs.Theirs"}
    (checkpoint / name).write_text(json.dumps(kinds | {"auto_map": auto_map}))
    (checkpoint / "theirs.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (load_processor, load_image_processor):
        with pytest.raises(UnsupportedError, match=rf"{name}: auto_map asks to run Python code"):
            load(checkpoint)
