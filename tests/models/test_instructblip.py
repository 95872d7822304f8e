"""The stages of InstructBLIP and InstructBLIP-Video against transformers, and what a layout refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import edit_config, edit_weights
from tests.checkpoints_instructblip import write_instructblip_checkpoint
from tests.models.layouts import (
    CAUGHT,
    assert_equal,
    assert_language_model_equals,
    difference,
    export,
    load_reference,
    unused_weights,
)
from torch import Tensor
from transformers import InstructBlipForConditionalGeneration, InstructBlipVideoForConditionalGeneration

from bridgeport.errors import CheckpointError, InputError, UnsupportedError
from bridgeport.models import VisionLanguageModel, load_checkpoint

EVERY_THIRD = {"cross_attention_frequency": 3}
# Odd sizes in each: heads, layers, patches, queries.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"seed": 1},
    "opt-odd": {
        "seed": 2,
        "text": "opt",
        "num_query_tokens": 3,
        "vision": {"image_size": 35, "patch_size": 7},
        "qformer": {"hidden_size": 30, "num_attention_heads": 3, "num_hidden_layers": 4, **EVERY_THIRD},
    },
    "one-query": {"seed": 3, "num_query_tokens": 1, "qformer": {"num_hidden_layers": 1}},
}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instructblip_checkpoint(tmp_path_factory.mktemp("instructblip"), **CONFIGS[request.param])


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instructblip_checkpoint(tmp_path_factory.mktemp("instructblip-video"), video=True, seed=4)


def pixels_for(model: VisionLanguageModel, count: int) -> Tensor:
    size = model.config.vision_config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def instructions(model: VisionLanguageModel, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random words; each row one token shorter than the one before it."""
    generator = torch.Generator().manual_seed(batch * length)
    ids = torch.randint(0, model.config.qformer_config.vocab_size, (batch, length), generator=generator)
    lengths = (length - torch.arange(batch)).clamp(min=1)
    return ids, (torch.arange(length)[None] < lengths[:, None]).long()


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7)])
def test_picture_and_instruction(checkpoint: Path, batch: int, length: int) -> None:
    model = load_checkpoint(checkpoint)
    reference = load_reference(InstructBlipForConditionalGeneration, checkpoint)
    pixels, (ids, mask) = pixels_for(model, batch), instructions(model, batch, length)
    with torch.inference_mode():
        outputs = reference.get_image_features(pixels, ids, mask)
        image_embeds = model.encoder(pixels)
        features = model.connector(image_embeds, ids, mask)
        other = model.connector(image_embeds, (ids + 1) % model.config.qformer_config.vocab_size, mask)
        unmasked = model.connector(image_embeds, ids, torch.ones_like(mask))
    assert_equal(image_embeds, outputs.vision_outputs.last_hidden_state, "encoder")
    assert_equal(features, outputs.pooler_output, "connector")
    # With one layer the words reach the queries, too: every layer begins with the shared self-attention.
    assert difference(other, features) > CAUGHT, "the instruction is not read"
    assert batch == 1 or difference(unmasked, features) > CAUGHT, "padding is read"


def test_padding_of_an_instruction_changes_nothing(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint)
    ids, mask = instructions(model, 2, 5)
    longer = torch.cat([ids, torch.full((2, 4), 3)], dim=1), torch.cat([mask, torch.zeros(2, 4, dtype=torch.long)], 1)
    with torch.inference_mode():
        image_embeds = model.encoder(pixels_for(model, 2))
        assert_equal(model.connector(image_embeds, *longer), model.connector(image_embeds, ids, mask), "padded")


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_every_frame_is_read_with_the_whole_instruction(video: Path, frames: int) -> None:
    model = load_checkpoint(video)
    reference = load_reference(InstructBlipVideoForConditionalGeneration, video)
    pixels, (ids, mask) = pixels_for(model, frames), instructions(model, 1, 6)
    with torch.inference_mode():
        want = reference.get_video_features(pixels[None], ids, mask).pooler_output
        got = model.connector(model.encoder(pixels), ids.expand(frames, -1), mask.expand(frames, -1))
    assert_equal(got.flatten(0, 1), want.flatten(0, -2), "video features")


def test_attention_maps_are_those_of_transformers(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint)
    reference = load_reference(InstructBlipForConditionalGeneration, checkpoint)
    pixels, (ids, mask) = pixels_for(model, 2), instructions(model, 2, 4)
    with torch.inference_mode():
        image_embeds = model.encoder(pixels)
        queries = reference.query_tokens.expand(2, -1, -1)
        whole = torch.cat([torch.ones(queries.shape[:2], dtype=torch.long), mask], dim=1)
        maps = reference.qformer(
            input_ids=ids, attention_mask=whole, query_embeds=queries, encoder_hidden_states=image_embeds,
            output_attentions=True,
        ).cross_attentions  # fmt: skip
        features, got = model.connector.with_attention(image_embeds, ids, mask)  # type: ignore[operator]
        assert_equal(features, model.connector(image_embeds, ids, mask), "features")
    assert_equal(got, torch.stack([one for one in maps if one is not None], dim=1), "cross_attention")


def test_language_models_and_all_weights_are_read(checkpoint: Path, video: Path) -> None:
    for path, kind in (
        (checkpoint, InstructBlipForConditionalGeneration),
        (video, InstructBlipVideoForConditionalGeneration),
    ):
        model = load_checkpoint(path)
        assert_language_model_equals(model, load_reference(kind, path).language_model)
        last = f"qformer.encoder.layer.{model.config.qformer_config.num_hidden_layers - 1}."
        # The text's feed-forward behind the last attention, of which nothing comes: six tensors.
        unused = unused_weights(model)
        assert len(unused) == 6
        assert all(name.startswith((f"{last}intermediate.", f"{last}output.")) for name in unused)
        assert all(model.layout.ignores(name) for name in unused)


def test_what_no_stage_reads_does_not_matter(tmp_path: Path) -> None:
    checkpoint = write_instructblip_checkpoint(tmp_path)
    reference = load_reference(InstructBlipForConditionalGeneration, checkpoint)
    model = load_checkpoint(checkpoint)
    pixels, (ids, mask) = pixels_for(model, 1), instructions(model, 1, 3)
    with torch.inference_mode():
        before = reference.get_image_features(pixels, ids, mask).pooler_output
        for name in unused_weights(model):
            reference.get_parameter(name).add_(1.0)
        after = reference.get_image_features(pixels, ids, mask).pooler_output
    assert torch.equal(before, after)


def test_buffers_of_older_releases_are_ignored(tmp_path: Path) -> None:
    checkpoint = write_instructblip_checkpoint(tmp_path)
    positions = torch.arange(8).float()[None]
    edit_weights(checkpoint, lambda state: state.update({"qformer.embeddings.position_ids": positions}))
    load_checkpoint(checkpoint)
    edit_weights(checkpoint, lambda state: state.update({"qformer.embeddings.other": positions}))
    with pytest.raises(CheckpointError, match=r"tensor qformer\.embeddings\.other of shape \[1, 8\] has no place"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "missing", ["qformer.embeddings.layernorm.bias", "qformer.encoder.layer.0.output.dense.weight", "query_tokens"]
)
def test_a_missing_weight_is_named(tmp_path: Path, missing: str) -> None:
    checkpoint = write_instructblip_checkpoint(tmp_path)
    edit_weights(checkpoint, lambda state: state.pop(missing))
    with pytest.raises(CheckpointError, match=f"tensor {missing} of shape .* is missing"):
        load_checkpoint(checkpoint)


def test_contracts_are_those_of_the_modules(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint)
    contract = model.contracts["connector"]
    assert [spec.name for spec in contract.inputs] == ["image_embeds", "qformer_input_ids", "qformer_attention_mask"]
    assert contract.axis("text").max == 220
    with torch.inference_mode():
        image_embeds = model.encoder(pixels_for(model, 2))
        features = model.connector(image_embeds, *instructions(model, 2, 3))
        assert tuple(image_embeds.shape[1:]) == contract.input("image_embeds").shape[1:]
        assert tuple(features.shape[1:]) == contract.outputs[0].shape[1:]
        with pytest.raises(InputError, match="text of 221 tokens is longer than the Q-Former's 220 positions"):
            model.connector(image_embeds, *instructions(model, 2, 221))


@pytest.mark.slow
def test_connector_exports_with_batch_and_text_dynamic(tmp_path: Path) -> None:
    """At batch 1, 3 and 5 and instructions of 4, 1 and 9 tokens, see `make_references`."""
    checkpoint = write_instructblip_checkpoint(tmp_path / "checkpoint", **CONFIGS["opt-odd"])
    operators = export(load_checkpoint(checkpoint), "connector", tmp_path)
    assert operators["Softmax"] == 4 + 2  # self-attention of each layer; layers 0 and 3 read the picture


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text_config.model_type": "bloom"}, UnsupportedError, "model_type 'bloom'; built so far are llama, opt, t5"),
        ({"image_token_index": None}, CheckpointError, "config.json has no image_token_index"),
        ({"image_token_index": 9999}, CheckpointError, "image_token_index 9999 is outside"),
        ({"vision_config.image_size": [28, 14]}, CheckpointError, r"image_size is .*; InstructBLIP takes one number"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str) -> None:
    checkpoint = write_instructblip_checkpoint(tmp_path)
    edit_config(checkpoint, **change)
    with pytest.raises(error, match=message):
        load_checkpoint(checkpoint)
