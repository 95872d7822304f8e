"""MiniGPT-4: read into BLIP-2's modules, equal to transformers' modules put together by hand on the same weights."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.checkpoints import write_blip2_checkpoint
from tests.checkpoints_foreign import MiniGpt4, edit_file, write_lavis_checkpoint, write_minigpt4_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bridgeport.errors import CheckpointError, UnsupportedError
from bridgeport.export.foreign import ReferenceProcessor, freeze_foreign, load_reference, stop_sequences
from bridgeport.manifest import TextSegment
from bridgeport.models import load_checkpoint
from bridgeport.runtime.processor import load_tokenizer, prepare_picture, tokenize_prompt

# FP32 through two or three small layers, as in test_checkpoint.py; observed at most 6e-6 on logits of order 10.
ABSOLUTE, RELATIVE = 2e-5, 2e-5

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"seed": 1},
    "odd": {
        "seed": 2,
        "pickled": True,
        "num_kv_heads": 1,
        "head_dim": 24,
        "num_query_tokens": 7,
        "image_size": 35,
        "patch_size": 7,
        "vision_layers": 3,
        "qformer_layers": 4,
        "cross_attention_frequency": 3,
        "extra_vocab": 0,
        "dtype": "float16",
    },
    "one file for encoder and Q-Former": {"seed": 3, "vision_apart": False, "qformer_layers": 1, "tie": True},
}


@pytest.fixture(scope="module")
def minigpt4(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], MiniGpt4]:
    """The MiniGPT-4 that `VARIANTS` has under a name, written once; do not change it."""
    written: dict[str, MiniGpt4] = {}

    def get(name: str) -> MiniGpt4:
        if name not in written:
            written[name] = write_minigpt4_checkpoint(tmp_path_factory.mktemp("minigpt4") / "m", **VARIANTS[name])
        return written[name]

    return get


def pictures(size: int, batch: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(7))


def compose(reference: MiniGpt4, pixel_values: Tensor) -> dict[str, Tensor]:
    """transformers' modules, one after the other."""
    with torch.no_grad():
        image_embeds = reference.vision(pixel_values).last_hidden_state
        queries = reference.query_tokens.expand(len(pixel_values), -1, -1)
        output = reference.qformer(query_embeds=queries, encoder_hidden_states=image_embeds)
        return {"encoder": image_embeds, "connector": reference.projection(output.last_hidden_state)}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_stages_and_greedy_tokens_equal_transformers(
    minigpt4: Callable[[str], MiniGpt4], name: str, batch: int
) -> None:
    reference = minigpt4(name)
    model = load_checkpoint(reference.path, allow_pickle=True)
    pixel_values = pictures(model.config.vision_config.image_size, batch)
    before, after = torch.tensor([[1, 9, 30]] * batch), torch.tensor([[7, 40, 200, 13, 5]] * batch)
    after[-1, 0] = 8
    theirs = compose(reference, pixel_values)
    with torch.no_grad():
        ours = {"encoder": model.encoder(pixel_values)}
        ours["connector"] = model.connector(ours["encoder"])
        embed = reference.language_model.get_input_embeddings()
        theirs["embed_tokens"] = torch.cat([embed(before), theirs["connector"], embed(after)], dim=1)
        # As the run time does: the whole prompt with placeholders, then the features in their places.
        queries = ours["connector"].shape[1]
        places = torch.full((batch, queries), model.config.image_token_index)
        merged = model.embed_tokens(torch.cat([before, places, after], dim=1)).clone()
        merged[:, before.shape[1] : before.shape[1] + queries] = ours["connector"]
        ours["embed_tokens"] = merged
        theirs["llm"] = reference.language_model(inputs_embeds=theirs["embed_tokens"]).logits
        ours["llm"] = model.language_model(inputs_embeds=merged).logits[..., :-1]
        for stage, tensor in theirs.items():
            difference = (ours[stage] - tensor).abs()
            assert torch.allclose(ours[stage], tensor, atol=ABSOLUTE, rtol=RELATIVE), (
                f"{stage}: max abs {difference.max():.3g}, mean {difference.mean():.3g}"
            )
        expected = greedy(reference.language_model, embed, theirs["embed_tokens"])
        assert greedy(model.language_model, model.embed_tokens, merged) == expected
    assert len({tuple(row) for row in expected}) == batch or batch == 1


def greedy(language_model: Any, embed: Any, inputs_embeds: Tensor, count: int = 12) -> list[list[int]]:
    tokens: list[Tensor] = []
    for _ in range(count):
        chosen = language_model(inputs_embeds=inputs_embeds).logits[:, -1].numpy().argmax(axis=-1)
        tokens.append(torch.from_numpy(chosen))
        inputs_embeds = torch.cat([inputs_embeds, embed(tokens[-1])[:, None]], dim=1)
    rows: list[list[int]] = torch.stack(tokens, dim=1).tolist()
    return rows


def test_a_changed_weight_shows(minigpt4: Callable[[str], MiniGpt4], tmp_path: Path) -> None:
    """The tolerance above can fail: every part of the directory reaches its stage."""
    reference = minigpt4("plain")
    stages = {
        "eva_vit_g": ("encoder", "blocks.1.attn.v_bias"),
        "blip2_pretrained_flant5xxl": ("connector", "Qformer.bert.encoder.layer.2.crossattention.self.value.weight"),
        "minigpt4": ("connector", "llama_proj.weight"),
    }
    theirs = compose(reference, pictures(28, 1))
    for stem, (stage, tensor) in stages.items():
        path = tmp_path / stem
        shutil.copytree(reference.path, path)
        edit_file(path / f"{stem}.safetensors", partial(_raise_first_column, tensor))
        model = load_checkpoint(path)
        with torch.no_grad():
            encoder = model.encoder(pictures(28, 1))
            ours = {"encoder": encoder, "connector": model.connector(encoder)}
        assert (ours[stage] - theirs[stage]).abs().max() > 10 * ABSOLUTE, stem


def _raise_first_column(tensor: str, state: dict[str, Tensor]) -> None:
    state[tensor][..., 0].add_(0.05)


def test_the_picture_token_is_never_chosen(minigpt4: Callable[[str], MiniGpt4]) -> None:
    model = load_checkpoint(minigpt4("plain").path)
    vocabulary = minigpt4("plain").language_model.config.vocab_size
    assert model.config.image_token_index == vocabulary
    assert model.contracts["llm"].outputs[0].shape == ("batch", vocabulary + 1)
    with torch.no_grad():
        logits = model.language_model(inputs_embeds=torch.randn(64, 2, 64)).logits[:, -1].numpy()
    assert np.array_equal(logits[:, -1], logits[:, 0])  # a tie with a lower id, always
    assert logits.argmax(axis=-1).max() < vocabulary


def test_image_size_resizes_the_position_embeddings(minigpt4: Callable[[str], MiniGpt4], tmp_path: Path) -> None:
    reference = minigpt4("plain")
    path = tmp_path / "larger"
    shutil.copytree(reference.path, path)
    set_parts(path, image_size=70)
    model = load_checkpoint(path)
    with torch.no_grad():
        theirs = reference.vision(pictures(70, 1), interpolate_pos_encoding=True).last_hidden_state
        assert torch.allclose(model.encoder(pictures(70, 1)), theirs, atol=ABSOLUTE, rtol=RELATIVE)


def test_image_contract_is_that_of_blip_image_eval(minigpt4: Callable[[str], MiniGpt4], tmp_path: Path) -> None:
    frozen = freeze_foreign(load_checkpoint(minigpt4("odd").path, allow_pickle=True), tmp_path)
    assert frozen is not None
    # The project: torchvision's Resize((n, n), BICUBIC), ToTensor, Normalize with CLIP's mean and deviation.
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (53, 37, 3), dtype=np.uint8))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = np.asarray(picture.resize((35, 35), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    theirs = ((pixels - mean) / std).transpose(2, 0, 1)
    ours = prepare_picture(picture, frozen.image)
    assert np.abs(ours.tensors["pixel_values"][0] - theirs).max() <= 1e-6
    assert ours.pieces == (7,)
    assert frozen.checks["image_max_abs"] <= 1e-6
    assert frozen.checks["pictures"] > 30


DEMO = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions.###Human: <Img>"
)


def test_prompt_is_that_of_the_demo(minigpt4: Callable[[str], MiniGpt4], tmp_path: Path) -> None:
    model = load_checkpoint(minigpt4("plain").path)
    frozen = freeze_foreign(model, tmp_path)
    assert frozen is not None
    token = model.config.image_token_index
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model.path / "vicuna")
    ids = list(tokenizer(DEMO)["input_ids"])
    assert ids[0] == tokenizer.bos_token_id
    ids += [token] * 4
    ids += list(tokenizer("</Img> How many {images}?###Assistant:", add_special_tokens=False)["input_ids"])
    run_time = load_tokenizer(frozen.tokenizer)
    found = tokenize_prompt(run_time, frozen.prompt, "How many {images}?", [(4,)])
    assert found.input_ids == ids
    assert found.image_positions == [i for i, value in enumerate(ids) if value == token]
    without = list(tokenizer(DEMO.removesuffix("<Img>") + "Hello?###Assistant:")["input_ids"])
    assert tokenize_prompt(run_time, frozen.prompt, "Hello?").input_ids == without
    # What a user types is never a picture.
    assert token not in tokenize_prompt(run_time, frozen.prompt, "<ImageHere> <Img>").input_ids
    assert frozen.generation.vocab_size == model.config.text_config.vocab_size
    assert frozen.generation.eos_token_ids[0] == tokenizer.eos_token_id


def test_a_prompt_of_ones_own(minigpt4: Callable[[str], MiniGpt4], tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(minigpt4("plain").path, path)
    set_parts(path, prompt="###Human: <Img><ImageHere></Img> {prompt} ###Assistant:", stop=["###", "Human:"])
    frozen = freeze_foreign(load_checkpoint(path), tmp_path / "tokenizer")
    assert frozen is not None
    assert [s.template for s in frozen.prompt.segments if isinstance(s, TextSegment)] == [
        "###Human: <Img>",
        "</Img> {prompt} ###Assistant:",
    ]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path / "vicuna")
    assert {tokenizer.decode(ids).strip() for ids in frozen.generation.stop_sequences} == {"###", "Human:"}


def test_lavis_directories_have_a_processor_of_their_own(minigpt4: Callable[[str], MiniGpt4], tmp_path: Path) -> None:
    path = write_lavis_checkpoint(tmp_path / "lavis", write_blip2_checkpoint(tmp_path / "source", text="opt"))
    assert freeze_foreign(load_checkpoint(path), tmp_path / "tokenizer") is None
    assert not (tmp_path / "tokenizer").exists()


def test_stop_words_in_every_spelling(minigpt4: Callable[[str], MiniGpt4], tmp_path: Path) -> None:
    vocabulary = ["<unk>", "\u2581", "#", "##", "\u2581##", "\u2581###", "a", "\u2581a", "<0x0A>", "."]
    merges = [("#", "#"), ("\u2581", "##"), ("\u2581##", "#"), ("\u2581", "a")]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, unk_token="<unk>", byte_fallback=True
    )
    llama = Tokenizer(model)
    llama.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    llama.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    make: Any = PreTrainedTokenizerFast
    # In Llama's own vocabulary these are [835] and [2277, 29937].
    assert set(stop_sequences(make(tokenizer_object=llama), ("###",))) == {(5,), (3, 2)}
    frozen = freeze_foreign(load_checkpoint(minigpt4("plain").path), tmp_path)
    assert frozen is not None
    tokenizer = ReferenceProcessor(load_checkpoint(minigpt4("plain").path)).tokenizer
    assert all(tokenizer.decode(ids).strip() == "###" for ids in frozen.generation.stop_sequences)
    assert frozen.generation.stop_sequences


def test_whole_model_in_transformers(minigpt4: Callable[[str], MiniGpt4]) -> None:
    """What parity holds a bundle against gives the composition's logits."""
    reference = minigpt4("plain")
    model = load_checkpoint(reference.path)
    whole, processor = load_reference(model) or pytest.fail("transformers does not load a MiniGPT-4 by itself")
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    inputs = processor(picture, "a photo of", return_tensors="pt")
    with torch.no_grad():
        ours = whole(**inputs).logits[0, -1, :-1]
        features = compose(reference, inputs["pixel_values"])["connector"][0]
        ids = inputs["input_ids"][0]
        place = int((ids == model.config.image_token_index).nonzero()[0])
        embed = reference.language_model.get_input_embeddings()
        merged = torch.cat([embed(ids[:place]), features, embed(ids[place + len(features) :])])
        theirs = reference.language_model(inputs_embeds=merged[None]).logits[0, -1]
    assert torch.allclose(ours, theirs, atol=ABSOLUTE, rtol=RELATIVE)


def set_parts(path: Path, **changes: Any) -> None:
    file = path / "minigpt4.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def set_language_model(path: Path, **changes: Any) -> None:
    file = path / "vicuna" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class _Touch:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def _pickled(path: Path, content: bytes) -> None:
    (path / "minigpt4.safetensors").unlink()
    (path / "minigpt4.pth").write_bytes(content)


def _drop(name: str) -> Callable[[Path], object]:
    return lambda p: edit_file(p / "blip2_pretrained_flant5xxl.safetensors", lambda s: s.pop(name))


def _project(name: str, *shape: int) -> Callable[[Path], object]:
    return lambda p: edit_file(p / "minigpt4.safetensors", lambda s: s.update({name: torch.ones(shape)}))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no projection": (
        lambda p: (p / "minigpt4.safetensors").unlink(),
        r"has no projection \(llama_proj\): neither minigpt4\.safetensors nor minigpt4\.pth",
    ),
    "no Q-Former": (
        lambda p: (p / "blip2_pretrained_flant5xxl.safetensors").unlink(),
        r"has no Q-Former of BLIP-2: neither blip2_pretrained_flant5xxl\.safetensors",
    ),
    "no vision encoder": (lambda p: (p / "eva_vit_g.safetensors").unlink(), r"has no vision encoder: neither eva_vit"),
    "no Vicuna": (lambda p: shutil.rmtree(p / "vicuna"), r"has no language model: .*vicuna has no config\.json"),
    "named part missing": (
        lambda p: set_parts(p, qformer="q.pth"),
        r"names q\.pth as Q-Former of BLIP-2, but there is",
    ),
    "truncated pickle": (
        lambda p: _pickled(p, b"PK\x03\x04" + bytes(50)),
        r"minigpt4\.pth cannot be read with weights_",
    ),
    "pickle with code": (
        lambda p: _pickled(p, pickle.dumps({"model": _Touch(p / "ran")})),
        r"minigpt4\.pth cannot be read with weights_only=True",
    ),
    "names of neither kind": (_project("model.mm_projector.bias", 3), r"tensor model\.mm_projector\.bias is not read"),
    "adapter": (_project("llama_model.base_model.lora_A", 3), r"lora_A is not read; .*merge adapters first"),
    "projection's shape": (
        _project("llama_proj.weight", 64, 25),
        r"tensor llama_proj\.weight has shape \[64, 25\], but .* ask for \[64, 24\]",
    ),
    "bias missing": (
        lambda p: edit_file(p / "minigpt4.safetensors", lambda s: s.pop("llama_proj.bias")),
        r"tensor llama_proj\.bias is missing",
    ),
    "Q-Former cut off": (_drop("query_tokens"), r"no BLIP-2 state_dict of LAVIS"),
    "layer of the Q-Former": (
        _drop("Qformer.bert.encoder.layer.2.output_query.dense.bias"),
        r"tensor qformer\.encoder\.layer\.2\.output_query\.dense\.bias of shape \[24\] is missing",
    ),
    "encoder of another width": (
        lambda p: edit_file(p / "eva_vit_g.safetensors", lambda s: s.update({"cls_token": torch.ones(1, 1, 31)})),
        r"tensor vision_model\.embeddings\.class_embedding has shape \[1, 1, 31\], .* asks for \[1, 1, 32\]",
    ),
    "too few blocks": (
        lambda p: set_parts(p, vision_layers=4),
        r"tensor vision_model\.encoder\.layers\.3\.\S+ of shape",
    ),
    "too many blocks": (lambda p: set_parts(p, vision_layers=1), r"layers\.2\.\S+ of shape .* has no place"),
    "heads": (lambda p: set_parts(p, vision_heads=5), r"vision_heads is 5, which does not divide the width 32"),
    "no number": (
        lambda p: set_parts(p, vision_heads=0),
        r"minigpt4\.json: vision_heads: .*greater than or equal to 1",
    ),
    "prompt without picture": (lambda p: set_parts(p, prompt="{prompt}"), r"prompt has <ImageHere> 0 times"),
    "picture after the prompt": (lambda p: set_parts(p, prompt="{prompt}<ImageHere>"), r"put the picture first"),
    "empty stop": (lambda p: set_parts(p, stop=[""]), r"stop has an empty text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_directories_are_named_in_one_line(minigpt4: Callable[[str], MiniGpt4], tmp_path: Path, name: str) -> None:
    spoil, message = BAD[name]
    path = tmp_path / "bad"
    shutil.copytree(minigpt4("plain").path, path)
    spoil(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, allow_pickle=True)
    assert "\n" not in str(caught.value)
    assert not (path / "ran").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_project("llama_proj.weight", 64, 128), "llama_proj takes 128 numbers, .* the variant without Q-Former"),
        (lambda p: set_language_model(p, model_type="opt"), "model_type is 'opt'; MiniGPT-4 is read with a 'llama'"),
        (lambda p: set_language_model(p, quantization_config={"bits": 4}), "the language model is quantised"),
    ],
)
def test_known_but_not_built(
    minigpt4: Callable[[str], MiniGpt4], tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "bad"
    shutil.copytree(minigpt4("plain").path, path)
    spoil(path)
    with pytest.raises(UnsupportedError, match=message):
        load_checkpoint(path)


def test_pickles_need_leave(minigpt4: Callable[[str], MiniGpt4]) -> None:
    with pytest.raises(CheckpointError, match=r"minigpt4\.pth is a pickle checkpoint.*--allow-pickle"):
        load_checkpoint(minigpt4("odd").path)
