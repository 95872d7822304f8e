"""Checkpoints: every stage equals transformers' on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.checkpoints import (
    TEXT_CONFIGS,
    copy_of,
    edit_weights,
    write_blip2_checkpoint,
    write_retrieval_checkpoint,
)
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from bridgeport.errors import CheckpointError
from bridgeport.models import load_checkpoint
from bridgeport.models.families import FAMILIES
from bridgeport.models.foreign import MODEL_TYPES

Checkpoints = Callable[[str], Path]

# FP32 through two or three small layers: values are of order 1 to 10, sums have at most 96 terms, and the
# attention kernels differ (eager, fused). Observed: at most 1.1e-5 on logits of order 10.
ABSOLUTE, RELATIVE = 2e-5, 2e-5
# A weight that is off by 5 % in one column moves its stage's output by at least this: 50 x the tolerance.
CAUGHT = 1e-3


def assert_equal(ours: Tensor, theirs: Tensor, what: str) -> None:
    difference = (ours - theirs).abs()
    worst = difference.max().item()
    assert torch.allclose(ours, theirs, atol=ABSOLUTE, rtol=RELATIVE), (
        f"{what}: max abs {worst:.3g}, mean {difference.mean().item():.3g}, at {int(difference.argmax())}"
    )


def pictures(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 28, 28, generator=torch.Generator().manual_seed(7))


def outputs(path: Path, **options: Any) -> dict[str, Tensor]:
    """Each of our stages' output, chained."""
    model = load_checkpoint(path, **options)
    ids = torch.tensor([[2, 11, 40], [2, 5, 300], [2, 7, 7]])
    with torch.no_grad():
        encoder = model.encoder(pictures())
        connector = model.connector(encoder)
        embeds = model.embed_tokens(ids)
        logits = model.language_model(inputs_embeds=torch.cat([connector, embeds], dim=1)).logits
    return {"encoder": encoder, "connector": connector, "embed_tokens": embeds, "llm": logits}


def reference_outputs(path: Path, **options: Any) -> dict[str, Tensor]:
    """The same of transformers' model."""
    model: Any = Blip2ForConditionalGeneration.from_pretrained(path, dtype=torch.float32, **options)
    ids = torch.tensor([[2, 11, 40], [2, 5, 300], [2, 7, 7]])
    with torch.no_grad():
        features = model.get_image_features(pictures())
        embeds = model.get_input_embeddings()(ids)
        inputs = torch.cat([features.pooler_output, embeds], dim=1)
        logits = model.language_model(inputs_embeds=inputs).logits
    return {
        "encoder": features.last_hidden_state,
        "connector": features.pooler_output,
        "embed_tokens": embeds,
        "llm": logits,
    }


@pytest.mark.parametrize("name", TEXT_CONFIGS)
def test_stages_equal_transformers(blip2_checkpoint: Checkpoints, name: str) -> None:
    path = blip2_checkpoint(name)
    ours, theirs = outputs(path), reference_outputs(path)
    for stage in ours:
        assert_equal(ours[stage], theirs[stage], f"{name} {stage}")


@pytest.mark.parametrize(
    ("stage", "tensor"),
    [
        ("encoder", "vision_model.encoder.layers.1.mlp.fc2.weight"),
        ("connector", "qformer.encoder.layer.2.crossattention.attention.value.weight"),
        ("connector", "query_tokens"),
        ("embed_tokens", "language_model.model.embed_tokens.weight"),
        ("llm", "language_model.model.layers.0.self_attn.k_proj.weight"),
    ],
)
def test_a_changed_weight_shows(blip2_checkpoint: Checkpoints, tmp_path: Path, stage: str, tensor: str) -> None:
    """The tolerance of `assert_equal` can fail: each weight reaches its stage's output."""
    changed = copy_of(blip2_checkpoint("llama"), tmp_path / "changed")
    # One column only: a LayerNorm would undo the scaling of a whole tensor.
    edit_weights(changed, lambda state: state[tensor][..., 0].mul_(1.05))
    ours, theirs = outputs(changed), reference_outputs(blip2_checkpoint("llama"))
    assert (ours[stage] - theirs[stage]).abs().max() > CAUGHT


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened(tmp_path: Path, dtype: str) -> None:
    path = write_blip2_checkpoint(tmp_path, text="opt", dtype=dtype)
    ours, theirs = outputs(path), reference_outputs(path)
    for stage in ours:
        assert ours[stage].dtype == torch.float32
        assert_equal(ours[stage], theirs[stage], f"{dtype} {stage}")


def test_shards_equal_one_file(tmp_path: Path) -> None:
    whole = write_blip2_checkpoint(tmp_path / "whole", text="opt")
    sharded = write_blip2_checkpoint(tmp_path / "sharded", text="opt", max_shard_size="100KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    ours, theirs = outputs(sharded), outputs(whole)
    for stage in ours:
        assert torch.equal(ours[stage], theirs[stage])
    assert {file.name for file in load_checkpoint(sharded).files} >= {
        "config.json",
        "model.safetensors.index.json",
    }


def test_a_stage_reads_its_own_tensors_only(blip2_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_checkpoint(blip2_checkpoint("opt"))
    read: list[str] = []
    original = model.weights.read

    def record(names: Any) -> dict[str, Tensor]:
        read.extend(names)
        return original(names)

    monkeypatch.setattr(model.weights, "read", record)
    prefixes = {
        "encoder": ("vision_model.",),
        "connector": ("qformer.", "query_tokens", "language_projection."),
        "embed_tokens": ("language_model.model.decoder.embed_tokens.",),
        "llm": ("language_model.",),
    }
    seen: set[str] = set()
    for stage in model.contracts:
        read.clear()
        module = model.load_stage(stage)
        assert read
        assert all(name.startswith(prefixes[stage]) for name in read)
        assert not module.training
        assert not any(p.requires_grad or p.device.type != "cpu" for p in module.parameters())
        assert not any(buffer.device.type != "cpu" for buffer in module.buffers())
        seen.update(read)
    assert seen == set(model.weights.entries)


def test_tied_head_is_one_parameter_whether_stored_or_not(blip2_checkpoint: Checkpoints, tmp_path: Path) -> None:
    stored = copy_of(blip2_checkpoint("opt"), tmp_path / "stored")
    head, embedding = "language_model.lm_head.weight", "language_model.model.decoder.embed_tokens.weight"
    edit_weights(stored, lambda state: state.update({head: state[embedding].clone()}))
    for path in (blip2_checkpoint("opt"), stored):
        model: Any = load_checkpoint(path).language_model
        assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert torch.equal(outputs(stored)["llm"], outputs(blip2_checkpoint("opt"))["llm"])

    edit_weights(stored, lambda state: state[head].mul_(1.5))
    with pytest.raises(CheckpointError, match=r"ties .*lm_head\.weight to .*embed_tokens\.weight.*tie_word_emb"):
        load_checkpoint(stored).load_stage("llm")


def test_buffers_that_older_versions_stored_are_let_be(blip2_checkpoint: Checkpoints, tmp_path: Path) -> None:
    path = copy_of(blip2_checkpoint("llama"), tmp_path / "old")
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(path, lambda state: state.update({name: torch.ones(8)}))
    assert torch.equal(outputs(path)["llm"], outputs(blip2_checkpoint("llama"))["llm"])


def test_a_config_as_transformers_4_wrote_it(blip2_checkpoint: Checkpoints, tmp_path: Path) -> None:
    path = copy_of(blip2_checkpoint("llama-mqa-wide"), tmp_path / "old")
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["torch_dtype"] = config.pop("dtype")
    config |= {"_name_or_path": "somewhere", "tie_word_embeddings": False, "transformers_version": "4.47.0"}
    text = config["text_config"]
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    text |= {"_name_or_path": "", "bad_words_ids": None, "torch_dtype": "float16", "num_beams": 1}
    config["vision_config"] |= {"dropout": 0.0, "initializer_factor": 1.0, "num_channels": 3}
    file.write_text(json.dumps(config))
    ours, theirs = outputs(path), reference_outputs(blip2_checkpoint("llama-mqa-wide"))
    for stage in ours:
        assert ours[stage].dtype == torch.float32
        assert_equal(ours[stage], theirs[stage], f"transformers 4 config, {stage}")


def test_contracts_describe_what_the_stages_take_and_give(blip2_checkpoint: Checkpoints) -> None:
    for name in TEXT_CONFIGS:
        model = load_checkpoint(blip2_checkpoint(name))
        ours = outputs(blip2_checkpoint(name))
        assert list(model.contracts) == ["encoder", "connector", "embed_tokens", "llm"]
        assert model.contracts["encoder"].bind_axes({"pixel_values": (3, 3, 28, 28)}) == {"batch": 3}
        shape = tuple(ours["encoder"].shape)
        assert model.contracts["connector"].bind_axes({"image_embeds": shape}) == {"batch": 3}
        for stage, tensor in {"encoder": "image_embeds", "connector": "image_features"}.items():
            spec = model.contracts[stage].outputs[0]
            assert spec.name == tensor
            assert spec.shape[1:] == tuple(ours[stage].shape[1:])
        hidden = ours["connector"].shape[-1]
        sizes = model.contracts["llm"].bind_axes(
            {"inputs_embeds": (2, 5, hidden), "attention_mask": (2, 9), "logits_position": (2,)}
        )
        assert sizes == {"batch": 2, "sequence": 5, "total_sequence": 9}
        assert model.contracts["llm"].axis("total_sequence").max == 128
        assert model.contracts["llm"].outputs[0].shape == ("batch", ours["llm"].shape[-1])
        cache: Any = model.language_model(inputs_embeds=torch.zeros(2, 5, hidden), use_cache=True).past_key_values
        assert model.kv_cache is not None
        assert len(cache.layers) == model.kv_cache.num_layers
        assert tuple(cache.layers[0].keys.shape) == (2, model.kv_cache.num_heads, 5, model.kv_cache.head_size)


@pytest.mark.parametrize("image_token", [False, True])
def test_retrieval_scores_equal_transformers(tmp_path: Path, image_token: bool) -> None:
    path = write_retrieval_checkpoint(tmp_path, image_token=image_token, seed=3)
    model, reference = load_checkpoint(path), Blip2ForImageTextRetrieval.from_pretrained(path)
    assert model.kind == "blip-2-retrieval"
    ids = torch.randint(3, 300, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 5 + [0]])
    # With an image token, transformers' processor puts placeholders first and the model cuts them off.
    placeholders = torch.full((3, 4), 320) if image_token else torch.empty(3, 0, dtype=torch.long)
    theirs = {
        "input_ids": torch.cat([placeholders, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(placeholders), mask], dim=1),
    }
    connector: Any = model.connector
    with torch.no_grad():
        embeds = model.encoder(pictures())
        contrast = reference(pictures(), **theirs).logits_per_image
        match = reference(pictures(), **theirs, use_image_text_matching_head=True).logits_per_image
        assert_equal(connector.contrast(embeds, ids, mask), contrast, "contrast")
        assert_equal(connector.match(embeds, ids, mask), match, "match")
        # What the mask hides must matter, or the two lines above would pass without it.
        assert (connector.match(embeds, ids) - match).abs().max() > CAUGHT


def test_pickle_needs_leave(blip2_checkpoint: Checkpoints, tmp_path: Path) -> None:
    path = copy_of(blip2_checkpoint("opt"), tmp_path / "pickle")
    state = load_file(path / "model.safetensors")
    torch.save({name: tensor.clone() for name, tensor in state.items()}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle checkpoint.*--allow-pickle"):
        load_checkpoint(path)
    ours, theirs = outputs(path, allow_pickle=True), outputs(blip2_checkpoint("opt"))
    for stage in ours:
        assert torch.equal(ours[stage], theirs[stage])


def test_every_family_names_real_classes() -> None:
    for model_type, family in FAMILIES.items():
        assert family.config_type().model_type == model_type
        for architecture in family.layouts:
            assert hasattr(transformers, architecture) or model_type in MODEL_TYPES
            assert callable(family.layout(architecture))
