"""Idefics' stages against transformers: pictures beside the prompt, read by gated cross-attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import edit_config, edit_weights
from tests.checkpoints_idefics import IDEFICS_CONFIGS, write_idefics_checkpoint
from tests.models.layouts import CAUGHT, assert_equal, difference, load_reference, unused_weights
from torch import Tensor
from transformers import IdeficsForVisionText2Text

from bridgeport.errors import CheckpointError, UnsupportedError
from bridgeport.models import VisionLanguageModel, load_checkpoint
from bridgeport.models.idefics import cross_attend, feed_forward, picture_mask
from bridgeport.models.t5 import rms_norm

# Row 0 sees picture 0, then 1; row 1 sees nothing at first, and then both at once, which no prompt does.
SEEN = torch.tensor([[[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]], [[0, 0], [0, 0], [1, 1], [1, 0], [0, 0]]])


@pytest.fixture(scope="module", params=IDEFICS_CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idefics_checkpoint(tmp_path_factory.mktemp(request.param), **IDEFICS_CONFIGS[request.param])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To spoil a copy of what it writes costs more than to write it anew: tests restore what they change."""
    return write_idefics_checkpoint(tmp_path_factory.mktemp("small"), **IDEFICS_CONFIGS["small"])


def pixels(model: VisionLanguageModel) -> Tensor:
    """Two random pictures for each of two rows."""
    size = model.config.vision_config.image_size
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))


def run_layers(model: VisionLanguageModel, inputs_embeds: Tensor, features: Tensor, seen: Tensor) -> Tensor:
    """Logits of our layers, with transformers' self-attention where the graph has an operator of ONNX Runtime."""
    decoder: Any = model.load_stage("llm")
    cross = model.load_stage("cross_kv")(features)
    length, interval = inputs_embeds.shape[1], model.config.cross_layer_interval
    causal = torch.full((length, length), -1e4).triu(1)[None, None]
    hidden = inputs_embeds
    masks = picture_mask(seen, model.config.perceiver_config.resampler_n_latents)
    for i, layer in enumerate(decoder.layers):
        at, skipped = divmod(i, interval)
        if not skipped:
            pair = list(cross[2 * at : 2 * at + 2])
            hidden = cross_attend(decoder.gated_cross_attn_layers[at], hidden, pair, *masks)
        normed = rms_norm(layer.input_layernorm, hidden)
        states, _ = layer.self_attn(normed, attention_mask=causal, position_ids=torch.arange(length)[None])
        hidden = hidden + states
        hidden = hidden + feed_forward(layer, hidden)
    logits: Tensor = decoder.lm_head(rms_norm(decoder.norm, hidden))
    return logits


def test_stages_equal_transformers(checkpoint: Path) -> None:
    model, reference = load_checkpoint(checkpoint), load_reference(IdeficsForVisionText2Text, checkpoint)
    images = pixels(model)
    ids = torch.arange(model.text_config.vocab_size)[None, -10:].reshape(2, 5)
    with torch.inference_mode():
        image_embeds = reference.model.vision_model(pixel_values=images).last_hidden_state
        features = reference.model.perceiver_resampler(image_embeds)
        embeds = reference.model.embed_tokens(ids)
        latents = features.unflatten(0, (2, 2))
        want = reference(inputs_embeds=embeds, perceiver_embeddings=latents, image_attention_mask=SEEN).logits
        assert_equal(model.encoder(images), image_embeds, "image_embeds")
        assert_equal(model.connector(image_embeds), features, "image_features")
        assert_equal(model.embed_tokens(ids), embeds, "inputs_embeds")
        got = run_layers(model, embeds, latents.flatten(1, 2), SEEN)
        # The comparison must tell a wrong picture, and a token that sees one too many.
        swapped = run_layers(model, embeds, latents.flip(1).flatten(1, 2), SEEN)
        everything = run_layers(model, embeds, latents.flatten(1, 2), torch.ones_like(SEEN))
    assert_equal(got, want, "logits")
    assert difference(swapped, want) > CAUGHT
    assert difference(everything, want) > CAUGHT


def test_token_without_picture_gets_nothing_of_pictures(small: Path) -> None:
    """Whatever the latents are, to the bit: the gate is a product with 0 and not a small weight."""
    model = load_checkpoint(small)
    embeds = torch.randn(1, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    latents = model.config.perceiver_config.resampler_n_latents
    nothing = torch.zeros(1, 3, 1, dtype=torch.int64)
    with torch.inference_mode():
        one, other = (
            run_layers(model, embeds, torch.full((1, latents, model.config.vision_config.embed_dim), value), nothing)
            for value in (0.3, -7.0)
        )
    assert torch.equal(one, other)


def test_every_weight_has_a_place(checkpoint: Path) -> None:
    assert unused_weights(load_checkpoint(checkpoint)) == [
        f"model.vision_model.post_layernorm.{part}" for part in ("bias", "weight")
    ]


def test_buffers_of_older_releases_are_passed_over(tmp_path: Path) -> None:
    checkpoint = write_idefics_checkpoint(tmp_path, **IDEFICS_CONFIGS["small"])
    buffers = (
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.gated_cross_attn_layers.0.cross_attn.rotary_emb.inv_freq",
        "model.vision_model.embeddings.position_ids",
    )
    edit_weights(checkpoint, lambda state: state.update({name: torch.zeros(4) for name in buffers}))
    load_checkpoint(checkpoint)
    edit_weights(checkpoint, lambda state: state.update({"model.layers.1.self_attn.other": torch.zeros(4)}))
    with pytest.raises(CheckpointError, match=r"self_attn\.other .*has no place"):
        load_checkpoint(checkpoint)


def test_tied_head_may_be_left_out(tmp_path: Path) -> None:
    checkpoint = write_idefics_checkpoint(tmp_path, **{**IDEFICS_CONFIGS["small"], "tie": True})
    edit_weights(
        checkpoint, lambda state: [state.pop(name, None) for name in list(state) if name.startswith("lm_head")]
    )
    model = load_checkpoint(checkpoint)
    head: Any = model.load_stage("llm").lm_head
    table: Any = model.embed_tokens
    assert torch.equal(head.weight, table.weight)
    assert torch.equal(head.additional_fc.weight, table.additional_embedding.weight)
    edit_config(checkpoint, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.\S+ of shape .* is missing"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"use_resampler": False}, UnsupportedError, "use_resampler is false"),
        ({"cross_layer_interval": 3}, CheckpointError, "cross_layer_interval 3 does not divide num_hidden_layers 2"),
        ({"vision_config.patch_size": [7, 7]}, CheckpointError, r"patch_size is .*takes one number"),
    ],
)
def test_config_that_is_not_built_is_refused(
    small: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = (small / "config.json").read_text()
    try:
        edit_config(small, **changes)
        with pytest.raises(error, match=message):
            load_checkpoint(small)
    finally:
        (small / "config.json").write_text(before)


def test_words_of_both_tables_are_counted(small: Path) -> None:
    model = load_checkpoint(small)
    total = model.config.vocab_size + model.config.additional_vocab_size
    assert model.config.additional_vocab_size == 2
    assert model.text_config.vocab_size == total
    assert model.contracts["llm"].outputs[0].shape == ("batch", total)
