"""What is wrong with a checkpoint directory is said in one line that names the file and the tensor."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import copy_of, edit_config, edit_weights, write_blip2_checkpoint
from tests.checkpoints_llava import write_llava_checkpoint

from bridgeport.errors import BridgeportError, CheckpointError, UnsupportedError
from bridgeport.models import load_checkpoint
from bridgeport.models.weights import open_weights

Checkpoints = Callable[[str], Path]


class _Touch:
    """Unpickling it makes a file, if anybody lets it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_pickle_that_runs_code_does_not(blip2_checkpoint: Checkpoints, tmp_path: Path) -> None:
    path = copy_of(blip2_checkpoint("opt"), tmp_path / "pickle")
    (path / "model.safetensors").unlink()
    canary = tmp_path / "ran"
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(canary)))
    with pytest.raises(CheckpointError, match=r"cannot be read with weights_only=True"):
        load_checkpoint(path, allow_pickle=True)
    assert not canary.exists()


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _corrupt_header(path: Path) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(data)


# What is wrong -> (how the directory is spoilt, what the one line must say).
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), r"is no checkpoint: it has no config\.json"),
    "config cut off": (
        lambda p: (p / "config.json").write_text('{"model_type": "bl'),
        r"config\.json cannot be read as JSON",
    ),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), r"holds a JSON list, not an object"),
    "unknown model_type": (
        lambda p: edit_config(p, model_type="bert"),
        r"model_type 'bert' is unknown; known are blip-2",
    ),
    "no model_type": (
        lambda p: edit_config(p, model_type=None),
        r"model_type None is unknown; known are blip-2",
    ),
    "unknown architecture": (
        lambda p: edit_config(p, architectures=["Blip2Model"]),
        r"'Blip2Model' is unknown for blip-2; known are Blip2ForConditionalGeneration, Blip2ForImageTextRetr",
    ),
    "nonsense in config": (
        lambda p: edit_config(p, **{"vision_config.hidden_size": "wide"}),
        r"config\.json is not a valid config .*hidden_size",
    ),
    "no image token": (lambda p: edit_config(p, image_token_index=None), r"has no image_token_index"),
    "image token outside": (
        lambda p: edit_config(p, image_token_index=9999),
        r"9999 is outside .* vocabulary of 3",
    ),
    "no weights": (
        lambda p: (p / "model.safetensors").unlink(),
        r"has no weights: neither model\.safetensors",
    ),
    "empty weights": (
        lambda p: (p / "model.safetensors").write_bytes(b""),
        r"model\.safetensors \(0 bytes\) is not a whole safetensors file",
    ),
    "truncated weights": (_truncate, r"model\.safetensors .* is not a whole safetensors file"),
    "corrupt weights": (_corrupt_header, r"model\.safetensors .* is not a whole safetensors file"),
    "shape": (
        lambda p: edit_weights(p, lambda s: s.update({"language_projection.weight": torch.zeros(64, 25)})),
        r"tensor language_projection\.weight has shape \[64, 25\], but config\.json asks for \[64, 24\]",
    ),
    "width in config": (
        lambda p: edit_config(p, **{"qformer_config.intermediate_size": 44}),
        r"tensor qformer\.encoder\.layer\.0\.intermediate_query\.dense\.\w+ has shape \[40.*asks for \[44",
    ),
    "missing tensor": (
        lambda p: edit_weights(p, lambda s: s.pop("query_tokens")),
        r"tensor query_tokens of shape \[1, 4, 24\] is missing",
    ),
    "layer missing": (
        lambda p: edit_config(p, **{"vision_config.num_hidden_layers": 3}),
        r"tensor vision_model\.encoder\.layers\.2\.\S+ of shape \[.*\] is missing \(and 11 more\)",
    ),
    "layer too many": (
        lambda p: edit_config(p, **{"text_config.num_hidden_layers": 1}),
        r"tensor language_model\.model\.layers\.1\.\S+ of shape .* has no place in the model \(and 8 more\)",
    ),
    "unknown tensor": (
        lambda p: edit_weights(p, lambda s: s.update({"extra.weight": torch.zeros(2)})),
        r"tensor extra\.weight of shape \[2\] has no place in the model",
    ),
    "untied head missing": (
        lambda p: edit_weights(p, lambda s: s.pop("language_model.lm_head.weight")),
        r"tensor language_model\.lm_head\.weight of shape \[\d+, 64\] is missing",
    ),
    "integer weight": (
        lambda p: edit_weights(p, lambda s: s.update({"query_tokens": torch.zeros(1, 4, 24, dtype=torch.int8)})),
        r"tensor query_tokens is stored as I8; accepted are F32, F16, BF16",
    ),
    "patches of no size": (
        lambda p: edit_config(p, **{"vision_config.patch_size": 0}),
        r"config\.json describes a model that cannot be built \(ZeroDivisionError: .*correct the value",
    ),
    "unknown activation": (
        lambda p: edit_config(p, **{"vision_config.hidden_act": "nope"}),
        r"config\.json describes a model that cannot be built \(KeyError: 'nope'\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_are_named_in_one_line(blip2_checkpoint: Checkpoints, tmp_path: Path, name: str) -> None:
    spoil, message = BAD[name]
    path = copy_of(blip2_checkpoint("llama"), tmp_path / "bad")
    spoil(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantised"),
        ({"text_config": {"model_type": "bart"}}, "model_type 'bart'; built so far are llama, opt, t5"),
    ],
)
def test_known_but_not_built(
    blip2_checkpoint: Checkpoints, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = copy_of(blip2_checkpoint("llama"), tmp_path / "bad")
    edit_config(path, **changes)
    with pytest.raises(UnsupportedError, match=message):
        load_checkpoint(path)


def test_projected_embeddings_are_not_built(tmp_path: Path) -> None:
    config = json.loads((write_blip2_checkpoint(tmp_path, text="opt") / "config.json").read_text())
    config["text_config"]["word_embed_proj_dim"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="word_embed_proj_dim 32 differs from hidden_size 64"):
        load_checkpoint(tmp_path)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist; a checkpoint is a local directory"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file; a checkpoint is"):
        load_checkpoint(tmp_path / "file")


def _rename_in_index(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def _store_twice(path: Path) -> None:
    shutil.copy(path / "model-00001-of-00002.safetensors", path / "model-00003.safetensors")
    _rename_in_index(path, lambda m: m.update({"again": "model-00003.safetensors"}))


BAD_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda p: sorted(p.glob("model-*.safetensors"))[1].unlink(),
        r"model-00002-of-\d+\.safetensors is missing, but model\.safetensors\.index\.json names it",
    ),
    "corrupt index": (
        lambda p: (p / "model.safetensors.index.json").write_text("{}"),
        r"index\.json is not an index of shards",
    ),
    "shard outside": (
        lambda p: _rename_in_index(p, lambda m: m.update({"query_tokens": "../x.safetensors"})),
        r"each must be the plain name of a file beside it",
    ),
    "index lies": (
        lambda p: _rename_in_index(p, lambda m: m.update({"not.there": next(iter(m.values()))})),
        r"says that \S+ holds the tensor not\.there, and it does not",
    ),
    "stored twice": (
        _store_twice,
        r"tensor \S+ is stored twice: in \S+ and in \S+",
    ),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_bad_shards_are_named(tmp_path: Path, name: str) -> None:
    path = write_blip2_checkpoint(tmp_path, text="opt", max_shard_size="500KB")
    spoil, message = BAD_SHARDS[name]
    spoil(path)
    with pytest.raises(BridgeportError, match=message) as caught:
        open_weights(path)
    assert "\n" not in str(caught.value)


def test_another_vision_tower_is_named(blip2_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """transformers would build BLIP-2's own tower and say nothing."""
    path = copy_of(blip2_checkpoint("llama"), tmp_path / "tower")
    edit_config(path, **{"vision_config.model_type": "pixtral"})
    with pytest.raises(UnsupportedError, match=r"tower is a 'pixtral'; supported is 'blip_2_vision_model'"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision_config.model_type": "dinov2"},
            "the vision tower is a 'dinov2'; supported are clip_vision",
        ),
        (
            {"vision_config.model_type": "eyes"},
            r"config\.json: the vision tower is a 'eyes'; supported are clip_vision",
        ),
        ({"text_config.model_type": "bloom"}, "text_config is of model_type 'bloom'; supported are llama, mistral"),
        ({"text_config.model_type": "words"}, r"config\.json: the language model is a 'words'; supported are llama"),
        ({"mm_projector_type": "resampler"}, "mm_projector_type is 'resampler'; supported are linear, mlp2x_gelu"),
    ],
    ids=["vision tower", "no vision tower", "text model", "no text model", "projector"],
)
def test_unknown_parts_of_llava_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_llava_checkpoint(tmp_path)
    edit_config(path, **change)
    with pytest.raises(UnsupportedError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_activation_is_blamed_on_config_json(tmp_path: Path) -> None:
    path = write_llava_checkpoint(tmp_path / "c")
    edit_config(path, projector_hidden_act="nope")
    with pytest.raises(CheckpointError, match=r"/c: config\.json: activation 'nope' is unknown; known are gelu, "):
        load_checkpoint(path)
