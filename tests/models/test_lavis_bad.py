"""What is wrong with a LAVIS directory is said in one line that names the file and the tensor."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import edit_config, write_blip2_checkpoint
from tests.checkpoints_foreign import edit_file, lavis_to_pickle, write_lavis_checkpoint
from torch import Tensor

from bridgeport.errors import CheckpointError
from bridgeport.models import load_checkpoint


@pytest.fixture(scope="module")
def lavis_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good LAVIS directory; copy it before changing it."""
    directory = tmp_path_factory.mktemp("lavis")
    source = write_blip2_checkpoint(directory / "source", text="opt")
    return write_lavis_checkpoint(directory / "lavis", source)


class _Touch:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def _forget(state: dict[str, Tensor]) -> None:
    state.clear()
    state["encoder.weight"] = torch.ones(2)


def _truncated_pickle(path: Path) -> None:
    file = lavis_to_pickle(path)
    file.write_bytes(file.read_bytes()[:-2000])


def _pickle_with_code(path: Path) -> None:
    lavis_to_pickle(path).write_bytes(pickle.dumps({"model": _Touch(path / "ran")}))


QKV = "blocks.0.attn."
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), r"has no config\.json; copy that of the same BLIP-2"),
    "no language model": (
        lambda p: (p / "llm" / "config.json").unlink(),
        r"has no language model: .*llm has no config\.json",
    ),
    "language model without weights": (
        lambda p: (p / "llm" / "model.safetensors").unlink(),
        r"llm has no weights",
    ),
    "no vision encoder": (
        lambda p: (p / "eva_vit_g.safetensors").unlink(),
        r"has no vision encoder: neither eva_vit_g\.safetensors nor eva_vit_g\.pth; .*lavis\.json",
    ),
    "named file missing": (
        lambda p: (p / "lavis.json").write_text('{"vision": "other.pth"}'),
        r"lavis\.json names other\.pth as vision encoder, but there is no such file",
    ),
    "unknown key": (
        lambda p: (p / "lavis.json").write_text('{"wieghts": "x"}'),
        r"lavis\.json: wieghts: .*known keys are weights, vision, language_model",
    ),
    "listing cut off": (lambda p: (p / "lavis.json").write_text("{"), r"lavis\.json cannot be read as JSON"),
    "truncated": (
        lambda p: (p / "lavis.safetensors").write_bytes((p / "lavis.safetensors").read_bytes()[:-100]),
        r"lavis\.safetensors .* is not a whole safetensors file",
    ),
    "truncated pickle": (_truncated_pickle, r"lavis\.pth cannot be read with weights_only=True"),
    "pickle with code": (_pickle_with_code, r"lavis\.pth cannot be read with weights_only=True"),
    "names of neither kind": (
        lambda p: edit_file(p / "lavis.safetensors", _forget),
        r"no BLIP-2 state_dict of LAVIS: it has no query_tokens .* but encoder\.weight",
    ),
    "transformers' names": (
        lambda p: edit_file(p / "lavis.safetensors", lambda s: s.update({"qformer.layernorm.bias": torch.ones(2)})),
        r"tensor qformer\.layernorm\.bias of shape \[2\] is none of LAVIS' BLIP-2",
    ),
    "another encoder": (
        lambda p: edit_file(p / "eva_vit_g.safetensors", lambda s: s.update({"trunk.stem.weight": torch.ones(2)})),
        r"tensor trunk\.stem\.weight is none of EVA ViT-g's",
    ),
    "value's bias missing": (
        lambda p: edit_file(p / "eva_vit_g.safetensors", lambda s: s.pop(f"{QKV}v_bias")),
        r"blocks\.0\.attn\.v_bias is missing, but .*q_bias is there",
    ),
    "shapes of the biases": (
        lambda p: edit_file(p / "eva_vit_g.safetensors", lambda s: s.update({f"{QKV}q_bias": torch.ones(5)})),
        r"q_bias has shape \[5\], .*v_bias has \[32\]",
    ),
    "shape": (
        lambda p: edit_file(p / "lavis.safetensors", lambda s: s.update({"opt_proj.weight": torch.ones(64, 25)})),
        r"tensor language_projection\.weight has shape \[64, 25\], but config\.json asks for \[64, 24\]",
    ),
    "two blocks too many": (
        lambda p: edit_config(p, **{"vision_config.num_hidden_layers": 1}),
        r"tensor vision_model\.encoder\.layers\.2\.\S+ of shape .* has no place",
    ),
    "vocabulary of the hub": (
        lambda p: edit_config(p, **{"text_config.vocab_size": 384}),
        r"text_config\.vocab_size is 384, but .*llm/config\.json has \d+; set it to",
    ),
    "two projects": (
        lambda p: (p / "minigpt4.json").write_text("{}"),
        r"lavis\.safetensors and minigpt4\.json, which are of two projects",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_directories_are_named_in_one_line(lavis_checkpoint: Path, tmp_path: Path, name: str) -> None:
    spoil, message = BAD[name]
    path = tmp_path / "bad"
    shutil.copytree(lavis_checkpoint, path)
    spoil(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, allow_pickle=True)
    assert "\n" not in str(caught.value)
    assert not (path / "ran").exists()
