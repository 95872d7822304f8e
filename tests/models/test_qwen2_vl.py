"""Qwen2-VL and Qwen2.5-VL: every stage equals transformers' on the same files, for pictures of several shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from tests.checkpoints import copy_of, edit_weights
from tests.checkpoints_qwen2_vl import write_qwen2_vl_checkpoint
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from bridgeport.errors import CheckpointError, UnsupportedError
from bridgeport.export.checks import check_equality, check_structure, make_references
from bridgeport.export.graph import OPSET, trace_and_save
from bridgeport.models import VisionLanguageModel, load_checkpoint

GetPath = Callable[[str], Path]

# FP32 through up to four small layers whose values reach 20: transformers has a convolution for the patches and smaller
# matrices for windows, so sums have another order. Observed: at most 8e-6 of the largest value.
OF_LARGEST, RELATIVE = 2e-5, 2e-5
CASES: dict[str, dict[str, Any]] = {
    "2": {"generation": "2"},
    "2-tied-merge3": {
        "generation": "2",
        "tie": True,
        "vision": {"patch_size": 5, "spatial_merge_size": 3, "temporal_patch_size": 1, "num_heads": 4},
    },
    "2.5": {"generation": "2.5"},
    "2.5-tied-wide-windows": {
        "generation": "2.5",
        "tie": True,
        "vision": {"window_size": 42, "fullatt_block_indexes": [1], "depth": 4},
        "text": {"num_key_value_heads": 3},
    },
}
# Height and width in tokens: one, thin ones, squares, edges that cut windows, larger than four windows.
GRIDS = ((1, 1), (1, 7), (5, 1), (2, 2), (3, 5), (6, 4), (7, 7))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> GetPath:
    """The checkpoint of a case, written once."""
    done: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in done:
            done[name] = write_qwen2_vl_checkpoint(tmp_path_factory.mktemp("qwen"), **CASES[name])
        return done[name]

    return get


def theirs(path: Path) -> Any:
    kind: Any = getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])
    return kind.from_pretrained(path, dtype=torch.float32).eval()


def picture(model: VisionLanguageModel, grid: tuple[int, int]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Random patches `[N, F]`, their grid `[1, 3]`, and the encoder's inputs, places by transformers' functions."""
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    thw = torch.tensor([[1, grid[0] * merge, grid[1] * merge]])
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.randn(int(thw.prod()), width, generator=torch.Generator().manual_seed(sum(grid)))
    inputs = {
        "pixel_values": patches.reshape(-1, merge**2, width),
        "rotary_position_ids": get_vision_position_ids(thw, merge).reshape(-1, merge**2, 2),
    }
    if model.kind == "qwen2.5-vl":
        _, starts = windows(model, thw)
        ids = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())[:: merge**2]
        inputs["token_windows"] = ids[window_order(model, thw)]
    return patches, thw, inputs


def windows(model: VisionLanguageModel, thw: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' order of the tokens by window, and where each window's patches start."""
    vision = model.config.vision_config
    return get_vision_window_index(thw, vision.spatial_merge_size, vision.window_size, vision.patch_size)


def window_order(model: VisionLanguageModel, thw: Tensor) -> Tensor:
    """Where each token of the picture stands in window order."""
    return windows(model, thw)[0].argsort()


def encode(model: VisionLanguageModel, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Our encoder's and connector's outputs."""
    _, _, inputs = picture(model, grid)
    with torch.no_grad():
        image_embeds = model.encoder(*inputs.values())
        return image_embeds, model.connector(image_embeds)


def assert_equal(ours: Any, reference: Any, what: str) -> None:
    difference = (ours - reference).abs()
    limit = OF_LARGEST * reference.abs().max() + RELATIVE * reference.abs()
    assert bool((difference <= limit).all()), (
        f"{what}: max abs {difference.max():.3g}, mean {difference.mean():.3g}, at {int(difference.argmax())}"
    )


@pytest.mark.parametrize("name", CASES)
def test_vision_stages_equal_transformers(checkpoint: GetPath, name: str) -> None:
    path = checkpoint(name)
    model, reference = load_checkpoint(path), theirs(path)
    for grid in GRIDS:
        patches, thw, _ = picture(model, grid)
        image_embeds, image_features = encode(model, grid)
        with torch.no_grad():
            expected = reference.model.visual(patches, grid_thw=thw)
        hidden = expected.last_hidden_state.reshape(image_embeds.shape)
        # transformers leaves the encoder's output in window order.
        hidden = hidden[window_order(model, thw)] if model.kind == "qwen2.5-vl" else hidden
        assert_equal(image_embeds, hidden, f"{name} encoder at {grid}")
        assert_equal(image_features[0], expected.pooler_output, f"{name} connector at {grid}")


@pytest.mark.parametrize("name", CASES)
def test_language_model_equals_transformers(checkpoint: GetPath, name: str) -> None:
    path = checkpoint(name)
    model, reference = load_checkpoint(path), theirs(path)
    ids = torch.tensor([[5, 80, 200, 13, 7], [9, 9, 31, 0, 1]])
    positions = torch.randint(0, 20, (3, 2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        embeds = model.embed_tokens(ids)
        logits = model.language_model(inputs_embeds=embeds, position_ids=positions).logits
        assert_equal(embeds, reference.get_input_embeddings()(ids), "embed_tokens")
        assert_equal(logits, reference(inputs_embeds=embeds, position_ids=positions).logits, f"{name} llm")


@pytest.mark.parametrize(
    ("name", "tensor", "stage"),
    [
        ("2", "visual.patch_embed.proj.weight", 0),
        ("2", "visual.blocks.1.attn.qkv.bias", 0),
        ("2.5", "visual.blocks.1.norm1.weight", 0),
        ("2.5", "visual.merger.mlp.2.weight", 1),
        ("2", "visual.merger.ln_q.bias", 1),
    ],
)
def test_a_changed_weight_shows(checkpoint: GetPath, tmp_path: Path, name: str, tensor: str, stage: int) -> None:
    """The tolerance of `assert_equal` can fail: each weight moves its stage by far more."""
    changed = copy_of(checkpoint(name), tmp_path / "changed")
    edit_weights(changed, lambda state: state[tensor][0].add_(0.05))
    before, after = (encode(load_checkpoint(path), (3, 5))[stage] for path in (checkpoint(name), changed))
    assert (before - after).abs().max() > 50 * OF_LARGEST * before.abs().max()


def test_windows_matter(checkpoint: GetPath) -> None:
    model = load_checkpoint(checkpoint("2.5"))
    *_, inputs = picture(model, (7, 7))
    with torch.no_grad():
        windows = model.encoder(*inputs.values())
        together = model.encoder(*(inputs | {"token_windows": torch.zeros_like(inputs["token_windows"])}).values())
    assert (windows - together).abs().max() > 0.01


@pytest.mark.parametrize("name", ["2", "2.5-tied-wide-windows"])
def test_new_names_equal_the_stored_ones(checkpoint: GetPath, tmp_path: Path, name: str) -> None:
    write_qwen2_vl_checkpoint(tmp_path, **CASES[name], names="new")
    old, new = load_checkpoint(checkpoint(name)), load_checkpoint(tmp_path)
    assert set(old.weights.entries) == set(new.weights.entries)
    for stage in old.contracts:
        states = old.load_stage(stage).state_dict(), new.load_stage(stage).state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_config_of_the_hub_is_read(checkpoint: GetPath, tmp_path: Path) -> None:
    """Flat text fields, `rope_scaling` of type mrope, the head tied at the root: what Qwen/Qwen2-VL-2B-Instruct has."""
    path = copy_of(checkpoint("2-tied-merge3"), tmp_path / "flat")
    file = path / "config.json"
    config = json.loads(file.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    drop = ("model_type", "tie_word_embeddings", "layer_types")
    config |= {key: value for key, value in text.items() if key not in drop}
    config |= {
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "rope_theta": rope["rope_theta"],
    }
    file.write_text(json.dumps(config))
    flat, nested = load_checkpoint(path), load_checkpoint(checkpoint("2-tied-merge3"))
    assert flat.contracts == nested.contracts
    ids, positions = torch.tensor([[5, 80, 200]]), torch.tensor([[[0, 1, 2]], [[0, 4, 2]], [[3, 1, 2]]])
    logits = []
    for model in (flat, nested):
        with torch.no_grad():
            logits.append(model.language_model(inputs_embeds=model.embed_tokens(ids), position_ids=positions).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("section", "changes", "error", "message"),
    [
        ("vision_config", {"patch_size": [7, 7]}, UnsupportedError, r"patch_size is \[7, 7\]; built is one number"),
        ("vision_config", {"hidden_size": 64}, CheckpointError, r"hidden_size is 64, but .* hidden_size is 48"),
        ("text_config", {"rope_parameters": {"mrope_section": [2, 2, 2], "rope_type": "default", "rope_theta": 1e4}},
         CheckpointError, r"mrope_section \[2, 2, 2\] must be 3 numbers that make 8"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_built_is_named(
    checkpoint: GetPath, tmp_path: Path, section: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = copy_of(checkpoint("2"), tmp_path / "changed")
    file = path / "config.json"
    config = json.loads(file.read_text())
    config[section] |= changes
    file.write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        load_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_vision_graphs_equal_the_modules(checkpoint: GetPath, tmp_path: Path, name: str) -> None:
    model = load_checkpoint(checkpoint(name))
    for stage in ("encoder", "connector"):
        contract, path = model.contracts[stage], tmp_path / stage / "model.onnx"
        module, examples = model.load_stage(stage), model.layout.stages[stage].examples
        references, norms = make_references(module, contract, examples=examples)
        trace_and_save(module, contract, path, examples=examples)
        shapes = {spec.name: spec.shape for spec in (*contract.inputs, *contract.outputs)}
        check_structure(path, shapes, stage=stage, opset=OPSET, layer_norms=norms, standard=True)
        check_equality(path, references, stage=stage, output=contract.outputs[0].name)
    assert_chain_equals(model, tmp_path)


def assert_chain_equals(model: VisionLanguageModel, directory: Path) -> None:
    """Both graphs one after the other, over pictures of all shapes."""
    encoder, connector = (
        onnxruntime.InferenceSession(directory / stage / "model.onnx", providers=["CPUExecutionProvider"])
        for stage in ("encoder", "connector")
    )
    for grid in GRIDS:
        *_, inputs = picture(model, grid)
        (image_embeds,) = encoder.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        (features,) = connector.run(None, {"image_embeds": image_embeds})
        assert features.shape == (1, int(np.prod(grid)), 48)
        assert_equal(torch.from_numpy(features), encode(model, grid)[1], f"graphs at {grid}")
