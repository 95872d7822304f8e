"""The first Qwen-VL: read from its project's files, equal to a composition of torch's and transformers' modules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.checkpoints_qwen_vl import QwenVl, write_qwen_vl_checkpoint
from torch import Tensor, nn

from bridgeport.errors import CheckpointError, UnsupportedError
from bridgeport.export.foreign import load_reference
from bridgeport.export.tokens.subjects import open_subject
from bridgeport.models import load_checkpoint
from bridgeport.models.checkpoint import read_layout
from bridgeport.models.qwen_vl import our_names

# FP32 through a few small layers: observed at most 8e-6 on values of order 10. A changed weight moves them by more
# than CAUGHT.
ABSOLUTE, RELATIVE, CAUGHT = 2e-5, 2e-5, 1e-3

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"seed": 1},
    # The encoder's grid is that of its positions; the resampler needs no projection.
    "one width, sharded": {
        "width": 128,
        "heads": 2,
        "patch": 2,
        "image_size": 32,
        "shards": 3,
        "chat": True,
        "seed": 2,
    },
    "odd": {"width": 40, "heads": 5, "patch": 5, "image_size": 33, "queries": 9, "hidden_size": 256, "seed": 3},
}


@pytest.fixture(scope="module")
def qwen_vl(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], QwenVl]:
    """The Qwen-VL that `VARIANTS` has under a name, written once; do not change it."""
    written: dict[str, QwenVl] = {}

    def get(name: str) -> QwenVl:
        if name not in written:
            written[name] = write_qwen_vl_checkpoint(tmp_path_factory.mktemp("qwen-vl") / "c", **VARIANTS[name])
        return written[name]

    return get


def pictures(size: int, batch: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_stages_equal_modules_of_torch_and_transformers(
    qwen_vl: Callable[[str], QwenVl], name: str, batch: int
) -> None:
    reference = qwen_vl(name)
    model = load_checkpoint(reference.path)
    pixel_values = pictures(model.config.vision_config.image_size, batch)
    ids = torch.tensor([[3, 40, 200, 13, 5, 99]] * batch)
    theirs = {"encoder": reference.vision(pixel_values)}
    theirs["connector"] = reference.connector(theirs["encoder"])
    theirs["embed_tokens"] = torch.cat([theirs["connector"], reference.language_model.model.embed_tokens(ids)], dim=1)
    theirs["llm"] = reference.language_model(inputs_embeds=theirs["embed_tokens"]).logits
    ours = {"encoder": model.encoder(pixel_values)}
    ours["connector"] = model.connector(ours["encoder"])
    ours["embed_tokens"] = torch.cat([ours["connector"], model.embed_tokens(ids)], dim=1)
    ours["llm"] = model.language_model(inputs_embeds=ours["embed_tokens"]).logits
    for stage, tensor in theirs.items():
        difference = (ours[stage] - tensor).abs()
        assert torch.allclose(ours[stage], tensor, atol=ABSOLUTE, rtol=RELATIVE), (
            f"{stage}: max abs {difference.max():.3g}, mean {difference.mean():.3g}"
        )
    assert not (reference.path / "ran").exists()


SPOILED = {
    "transformer.visual.positional_embedding": "encoder",
    "transformer.visual.transformer.resblocks.1.attn.in_proj.bias": "encoder",
    "transformer.visual.transformer.resblocks.0.mlp.c_fc.weight": "encoder",
    "transformer.visual.attn_pool.attn.in_proj_weight": "connector",
    "transformer.visual.attn_pool.query": "connector",
    "transformer.visual.proj": "connector",
    "transformer.h.1.mlp.w2.weight": "llm",
    "transformer.h.0.attn.c_attn.bias": "llm",
}


@torch.no_grad()
def test_a_changed_weight_shows(qwen_vl: Callable[[str], QwenVl], tmp_path: Path) -> None:
    """The tolerance above can fail: what is stored reaches the stage that it belongs to."""
    reference = qwen_vl("plain")
    for number, (tensor, stage) in enumerate(SPOILED.items()):
        path = tmp_path / str(number)
        shutil.copytree(reference.path, path)
        state = load_file(path / "model.safetensors")
        state[tensor].view(-1)[: state[tensor].numel() // 7] += 0.1
        save_file(state, path / "model.safetensors")
        model, before = load_checkpoint(path), load_checkpoint(reference.path)
        inputs = {
            "encoder": pictures(28, 1),
            "connector": torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(1)),
            "llm": torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(1)),
        }[stage]
        name = {"inputs_embeds": inputs} if stage == "llm" else {}
        made = [one.load_stage(stage)(*(() if name else (inputs,)), **name) for one in (model, before)]
        after, unchanged = (getattr(one, "logits", one) for one in made)
        assert (after - unchanged).abs().max() > CAUGHT, tensor


def test_heads_are_interleaved_as_in_the_project() -> None:
    """`VisualAttention.forward`: `[..., heads, 3 * size]` is split in three along the last axis."""
    from bridgeport.models.qwen_vl import _take_part

    heads, size, width = 3, 4, 12
    weight = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    mixed = nn.functional.linear(x, weight).view(5, heads, 3 * size)
    for place, want in enumerate(mixed.chunk(3, dim=-1)):
        got = nn.functional.linear(x, _take_part(heads, place)([weight])).view(5, heads, size)
        assert torch.allclose(got, want, atol=1e-6)
    assert not torch.allclose(_take_part(1, 0)([weight]), _take_part(heads, 0)([weight]))


def test_names_of_the_project() -> None:
    assert our_names("transformer.h.31.mlp.w1.weight") == ("language_model.model.layers.31.mlp.up_proj.weight",)
    assert our_names("transformer.h.0.mlp.w2.weight") == ("language_model.model.layers.0.mlp.gate_proj.weight",)
    assert our_names("transformer.visual.transformer.resblocks.47.attn.in_proj.bias") == tuple(
        f"vision_model.layers.47.self_attn.{letter}_proj.bias" for letter in "qkv"
    )
    assert our_names("transformer.visual.attn_pool.attn.in_proj_bias") == ("connector.attn_pool.attn.in_proj_bias",)
    assert our_names("base_model.lora_A") == ("base_model.lora_A",)


def test_published_sizes() -> None:
    """The published config.json: 1024 patches, 256 queries, a context where Qwen is Qwen2, the ids of its tokens."""
    from bridgeport.models.families import FAMILIES
    from bridgeport.models.qwen_vl import _Config, _convert

    visual = {
        "heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48, "mlp_ratio": 4.9231,
        "output_dim": 4096, "patch_size": 14, "width": 1664,
    }  # fmt: skip
    raw = {"model_type": "qwen", "architectures": ["QWenLMHeadModel"], "seq_length": 2048, "visual": visual}
    config = FAMILIES["qwen"].config_type().from_dict(_convert(Path("nowhere"), raw, _Config.model_validate(raw)))
    layout = FAMILIES["qwen"].layout("QWenLMHeadModel")(config)
    assert config.vision_config.intermediate_size == 8192
    assert layout.contracts["encoder"].outputs[0].shape == ("batch", 1024, 1664)
    assert layout.contracts["connector"].outputs[0].shape == ("batch", 256, 4096)
    assert layout.contracts["llm"].axis("total_sequence").max == 2048
    assert layout.text_config.intermediate_size == 11008
    assert (config.image_token_id, layout.text_config.eos_token_id) == (151859, [151643])
    numbers = {
        name: sum(t.numel() for t in stage.on_meta().state_dict().values()) for name, stage in layout.stages.items()
    }
    # 1.9 B, 0.08 B and 7.7 B in the paper's table 1.
    assert (numbers["encoder"] // 10**7, numbers["llm"] // 10**8) == (184, 77)
    assert numbers["connector"] // 10**6 == 92


def test_layout_without_weights(qwen_vl: Callable[[str], QwenVl], tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(qwen_vl("odd").path / name, tmp_path / name)
    config, layout = read_layout(tmp_path)
    assert (layout.kind, config.num_query_tokens) == ("qwen-vl", 9)
    subject = open_subject(str(tmp_path))
    assert (subject.architecture, subject.context, subject.image.tiling.tokens) == ("QWenLMHeadModel", 512, 9)  # type: ignore[union-attr]


@torch.no_grad()
def test_whole_model_of_parity_gives_the_compositions_logits(qwen_vl: Callable[[str], QwenVl]) -> None:
    reference = qwen_vl("odd")
    model = load_checkpoint(reference.path)
    whole, processor = load_reference(model) or pytest.fail("transformers has no Qwen-VL")
    inputs = processor(Image.effect_noise((40, 30), 60).convert("RGB"), "a photo of", return_tensors="pt")
    features = reference.connector(reference.vision(inputs["pixel_values"]))[0]
    ids = inputs["input_ids"][0]
    place = int((ids == model.config.image_token_id).nonzero()[0])
    embed = reference.language_model.model.embed_tokens
    merged = torch.cat([embed(ids[:place]), features, embed(ids[place + len(features) :])])
    theirs = reference.language_model(inputs_embeds=merged[None]).logits
    assert torch.allclose(whole(**inputs).logits, theirs, atol=ABSOLUTE, rtol=RELATIVE)


def set_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def set_visual(path: Path, **changes: Any) -> None:
    set_config(path, visual=json.loads((path / "config.json").read_text())["visual"] | changes)


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors")


BAD: dict[str, tuple[type[Exception], Callable[[Path], object], str]] = {
    "text only": (UnsupportedError, lambda p: set_config(p, visual=None), r"without the part visual is the text-only"),
    "quantised": (UnsupportedError, lambda p: set_config(p, quantization_config={"bits": 4}), r"is quantised"),
    "biases": (UnsupportedError, lambda p: set_config(p, no_bias=False), r"no_bias is False; built is True"),
    "partial rotary": (UnsupportedError, lambda p: set_config(p, rotary_pct=0.25), r"rotary_pct is 0\.25; built is 1"),
    "tied": (UnsupportedError, lambda p: set_config(p, tie_word_embeddings=True), r"tie_word_embeddings is True"),
    "chat format": (
        UnsupportedError,
        lambda p: (p / "generation_config.json").write_text('{"chat_format": "alpaca"}'),
        r"generation_config\.json: chat_format is 'alpaca'; accepted are raw, chatml",
    ),
    "channels": (CheckpointError, lambda p: set_config(p, kv_channels=16), r"4 heads of 16 .* hidden_size 128"),
    "no width": (CheckpointError, lambda p: set_visual(p, width=None), r"visual\.width: Input should be a valid int"),
    "heads": (CheckpointError, lambda p: set_visual(p, heads=5), r"visual\.heads 5 does not divide visual\.width 24"),
    "output": (
        CheckpointError,
        lambda p: set_visual(p, output_dim=64),
        r"output_dim is 64 and hidden_size 128",
    ),
    "queries": (CheckpointError, lambda p: set_visual(p, n_queries=5), r"n_queries 5 is no square"),
    "small": (CheckpointError, lambda p: set_visual(p, image_size=6), r"image_size 6 is below visual\.patch_size 7"),
    "ids": (CheckpointError, lambda p: set_visual(p, image_start_id=10**6), r"image_start_id 1000000 is too high"),
    "a layer too many": (
        CheckpointError,
        lambda p: set_config(p, num_hidden_layers=3),
        r"language_model\.model\.layers\.2\.\S+ of shape .* is missing",
    ),
    "other width": (
        CheckpointError,
        lambda p: set_config(p, intermediate_size=100),
        r"has shape \[128, 72\], .*\[128, 50",
    ),
    "adapter": (
        CheckpointError,
        lambda p: edit(p, lambda s: s.update({"transformer.h.0.attn.c_attn.lora_A": torch.ones(2, 2)})),
        r"lora_A of shape \[\d, 2\] has no place",
    ),
    "positions": (
        CheckpointError,
        lambda p: edit(p, lambda s: s.update({"transformer.visual.positional_embedding": torch.ones(64, 24)})),
        r"vision_model\.positional_embedding has shape \[64, 24\], .* asks for \[256, 24\]",
    ),
    "no weights": (CheckpointError, lambda p: (p / "model.safetensors").unlink(), r"has no weights"),
    "cut off": (CheckpointError, lambda p: (p / "config.json").write_text('{"model_type": "qwen"'), r"as JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_directories_are_named_in_one_line(qwen_vl: Callable[[str], QwenVl], tmp_path: Path, name: str) -> None:
    kind, spoil, message = BAD[name]
    path = tmp_path / "bad"
    shutil.copytree(qwen_vl("plain").path, path)
    spoil(path)
    with pytest.raises(kind, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not (path / "ran").exists()


def test_the_context_is_longer_where_nothing_changes_beyond_it(
    qwen_vl: Callable[[str], QwenVl], tmp_path: Path
) -> None:
    path = tmp_path / "c"
    shutil.copytree(qwen_vl("plain").path, path)
    set_config(path, use_dynamic_ntk=False, use_logn_attn=False)
    assert load_checkpoint(path).contracts["llm"].axis("sequence").max == 2048
    set_config(path, use_logn_attn=True)
    assert load_checkpoint(path).contracts["llm"].axis("sequence").max == 512
