"""LAVIS' BLIP-2: names to transformers' and back, and every stage equal to transformers' on the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import randomize, write_blip2_checkpoint, write_retrieval_checkpoint
from tests.checkpoints_foreign import edit_file, lavis_state, lavis_to_pickle, without_key_bias, write_lavis_checkpoint
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    OPTConfig,
    T5Config,
)

from bridgeport.errors import CheckpointError
from bridgeport.models import load_checkpoint
from bridgeport.models.families import FAMILIES
from bridgeport.models.foreign import transformers_model
from bridgeport.models.lavis import (
    ConvertedWeights,
    from_transformers,
    lavis_from_transformers,
    read,
    to_transformers,
    transformers_from_lavis,
    vision_sources,
)
from bridgeport.models.weights import TensorEntry, open_weight_file, open_weights

# The conversion moves numbers and computes none, so stages are equal up to the attention kernel: FP32, values of order
# 1 to 10. Observed: at most 1.1e-5 on logits of order 10.
ABSOLUTE, RELATIVE = 2e-5, 2e-5


class InMemory:
    """Tensors as `Weights`."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = dict(state)
        self.files: tuple[Path, ...] = (Path("memory"),)
        self.entries = {name: TensorEntry("F32", tuple(t.shape), Path("memory")) for name, t in self.state.items()}
        self.asked: list[str] = []

    def read(self, names: Any) -> dict[str, Tensor]:
        wanted = list(names)
        self.asked += wanted
        return {name: self.state[name] for name in wanted}


def vision(**sizes: int) -> dict[str, int]:
    return {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2} | sizes


def qformer(**sizes: Any) -> dict[str, Any]:
    return {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 3} | sizes


def opt(**sizes: Any) -> Any:
    return OPTConfig(
        vocab_size=9, num_hidden_layers=1, num_attention_heads=1, **({"hidden_size": 8} | sizes), ffn_dim=8
    )


def random_model(kind: str) -> Any:
    """A random model of one of several shapes."""
    if kind == "t5":
        text: Any = T5Config(vocab_size=9, d_model=10, d_kv=5, d_ff=7, num_layers=2, num_heads=2)
        config = Blip2Config(vision_config=vision(image_size=28), qformer_config=qformer(), text_config=text.to_dict())
        return Blip2ForConditionalGeneration(config)
    if kind == "retrieval":
        config = Blip2Config(
            vision_config=vision(image_size=28),
            qformer_config=qformer(use_qformer_text_input=True, vocab_size=11, max_position_embeddings=6),
            text_config=opt().to_dict(),
            image_text_hidden_size=5,
        )
        return Blip2ForImageTextRetrieval(config)
    sizes = {
        "opt": (vision(image_size=28), qformer()),
        "opt-odd": (
            vision(image_size=35, patch_size=7, num_hidden_layers=3),
            qformer(num_hidden_layers=4, cross_attention_frequency=3),
        ),
    }[kind]
    config = Blip2Config(vision_config=sizes[0], qformer_config=sizes[1], text_config=opt().to_dict())
    return Blip2ForConditionalGeneration(config)


def random_state(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = random_model(kind).state_dict()
    return without_key_bias(
        {name: torch.randn(t.shape, generator=generator) for name, t in state.items() if t.is_floating_point()}
    )


SHAPES = {"opt": "opt", "opt-odd": "llm", "t5": "t5", "retrieval": "opt"}


@pytest.mark.parametrize("kind", SHAPES)
def test_round_trip(kind: str) -> None:
    theirs = random_state(kind)
    weights = InMemory(theirs)
    lavis = ConvertedWeights(lavis_from_transformers(weights, SHAPES[kind]))
    stored = lavis.read(lavis.entries)
    expected = lavis_state(theirs, SHAPES[kind])
    assert set(stored) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name
        assert lavis.entries[name].shape == tuple(tensor.shape)
    back = ConvertedWeights(transformers_from_lavis(InMemory(stored)))
    again = back.read(back.entries)
    assert set(again) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(again[name], tensor), name
        assert back.entries[name].shape == tuple(tensor.shape)


def test_names_are_those_of_lavis() -> None:
    """Golden: names as LAVIS' Blip2Base, EVA ViT and Qformer define them, and transformers'."""
    golden = {
        "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
        "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
        "visual_encoder.patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
        "visual_encoder.blocks.38.norm2.weight": "vision_model.encoder.layers.38.layer_norm2.weight",
        "visual_encoder.blocks.38.attn.qkv.weight": "vision_model.encoder.layers.38.self_attn.qkv.weight",
        "visual_encoder.blocks.0.attn.proj.bias": "vision_model.encoder.layers.0.self_attn.projection.bias",
        "visual_encoder.blocks.0.mlp.fc2.weight": "vision_model.encoder.layers.0.mlp.fc2.weight",
        "ln_vision.weight": "vision_model.post_layernorm.weight",
        "query_tokens": "query_tokens",
        "Qformer.bert.embeddings.LayerNorm.bias": "qformer.layernorm.bias",
        "Qformer.bert.embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
        "Qformer.bert.encoder.layer.3.attention.self.query.weight": (
            "qformer.encoder.layer.3.attention.attention.query.weight"
        ),
        "Qformer.bert.encoder.layer.3.attention.output.dense.bias": (
            "qformer.encoder.layer.3.attention.output.dense.bias"
        ),
        "Qformer.bert.encoder.layer.2.crossattention.self.value.bias": (
            "qformer.encoder.layer.2.crossattention.attention.value.bias"
        ),
        "Qformer.bert.encoder.layer.11.intermediate_query.dense.weight": (
            "qformer.encoder.layer.11.intermediate_query.dense.weight"
        ),
        "Qformer.bert.encoder.layer.11.output.LayerNorm.weight": "qformer.encoder.layer.11.output.LayerNorm.weight",
        "vision_proj.weight": "vision_projection.weight",
        "text_proj.bias": "text_projection.bias",
        "itm_head.bias": "itm_head.bias",
        "opt_proj.weight": "language_projection.weight",
        "opt_model.model.decoder.layers.0.fc1.weight": "language_model.model.decoder.layers.0.fc1.weight",
    }
    for lavis, theirs in golden.items():
        assert to_transformers(lavis) == theirs
        assert from_transformers(theirs, "opt") == (lavis,)
    assert to_transformers("t5_proj.bias") == to_transformers("llm_proj.bias") == "language_projection.bias"
    assert from_transformers("language_model.shared.weight", "t5") == ("t5_model.shared.weight",)
    for bias in ("q_bias", "v_bias"):
        fused = "vision_model.encoder.layers.7.self_attn.qkv.bias"
        assert to_transformers(f"visual_encoder.blocks.7.attn.{bias}") == fused
    assert from_transformers(fused) == ("visual_encoder.blocks.7.attn.q_bias", "visual_encoder.blocks.7.attn.v_bias")
    for unused in ("temp", "Qformer.cls.predictions.bias", "Qformer.bert.embeddings.position_ids", "opt_projection.w"):
        assert to_transformers(unused) is None
    assert from_transformers("vision_tower.weight") == ()


def test_published_sizes_fit_the_layout() -> None:
    """BLIP-2 OPT 2.7B as it is published: 39 of EVA ViT-g's 40 blocks, 32 queries; shapes only."""
    config = Blip2Config(image_token_index=50265)
    with torch.device("meta"):
        state = Blip2ForConditionalGeneration(config).state_dict()
    lavis = lavis_state(dict(state), "opt")
    plain = {n.removeprefix("visual_encoder."): t for n, t in lavis.items() if n.startswith("visual_encoder.")}
    assert plain["pos_embed"].shape == (1, 257, 1408)
    plain |= {n.replace("blocks.0.", "blocks.39."): t for n, t in plain.items() if n.startswith("blocks.0.")}
    rest = {n: t for n, t in lavis.items() if not n.startswith("visual_encoder.")}
    sources = transformers_from_lavis(InMemory(rest)) | vision_sources(InMemory(plain), (39, 16))
    layout = FAMILIES["blip-2"].layout("Blip2ForConditionalGeneration")(config)
    layout.check(ConvertedWeights(sources), "published")
    with pytest.raises(CheckpointError, match=r"blocks\.39|layers\.39"):
        layout.check(ConvertedWeights(sources | vision_sources(InMemory(plain), (40, 16))), "published")


def test_a_bias_of_the_keys_has_no_place_in_lavis() -> None:
    state = random_state("opt")
    name = "vision_model.encoder.layers.1.self_attn.qkv.bias"
    state[name][16:32] = 0.5
    lavis = ConvertedWeights(lavis_from_transformers(InMemory(state)))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.qkv\.bias has a bias of the keys"):
        lavis.read(["visual_encoder.blocks.1.attn.q_bias"])
    with pytest.raises(CheckpointError, match=r"tensor vision_tower\.x is none of BLIP-2's"):
        lavis_from_transformers(InMemory({"vision_tower.x": torch.zeros(1)}))


def test_tensors_are_read_one_at_a_time() -> None:
    weights = InMemory(lavis_state(random_state("opt"), "opt"))
    converted = ConvertedWeights(transformers_from_lavis(weights))
    assert weights.asked == []
    converted.read(["vision_model.encoder.layers.0.self_attn.qkv.bias"])
    assert weights.asked == ["visual_encoder.blocks.0.attn.q_bias", "visual_encoder.blocks.0.attn.v_bias"]


@pytest.mark.parametrize(("size", "patch", "wanted"), [(28, 14, 70), (35, 7, 49), (70, 14, 28)])
def test_position_embeddings_are_resized_as_transformers_does(size: int, patch: int, wanted: int) -> None:
    """LAVIS resizes them when it loads, transformers when it runs; the model is the same."""
    config = Blip2Config(vision_config=vision(image_size=size, patch_size=patch)).vision_config
    from transformers import Blip2VisionModel

    make: Any = Blip2VisionModel
    model: Any = make(config).eval()
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.embeddings.position_embedding, generator=generator)
    stored = lavis_state({f"vision_model.{name}": t for name, t in model.state_dict().items()}, "opt")
    plain = {name.removeprefix("visual_encoder."): t for name, t in stored.items() if "ln_vision" not in name}
    sources = vision_sources(InMemory(plain), (2, wanted // patch))
    found = ConvertedWeights(sources).read(["vision_model.embeddings.position_embedding"])
    ours = found["vision_model.embeddings.position_embedding"]
    embeddings = model.embeddings(torch.zeros(1, 3, wanted, wanted), interpolate_pos_encoding=True)
    model.embeddings.position_embedding = torch.nn.Parameter(ours)
    assert sources["vision_model.embeddings.position_embedding"].shape == tuple(ours.shape)
    assert torch.allclose(model.embeddings(torch.zeros(1, 3, wanted, wanted)), embeddings, atol=1e-6, rtol=1e-6)


def pictures() -> Tensor:
    return torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(7))


def outputs(model: Any) -> dict[str, Tensor]:
    ids = torch.tensor([[2, 11, 40], [2, 5, 300], [2, 7, 7]])
    with torch.no_grad():
        encoder = model.encoder(pictures())
        connector = model.connector(encoder)
        embeds = model.embed_tokens(ids)
        logits = model.language_model(inputs_embeds=torch.cat([connector, embeds], dim=1)).logits
    return {"encoder": encoder, "connector": connector, "embed_tokens": embeds, "llm": logits}


def reference_outputs(model: Any) -> dict[str, Tensor]:
    ids = torch.tensor([[2, 11, 40], [2, 5, 300], [2, 7, 7]])
    with torch.no_grad():
        features = model.get_image_features(pictures())
        embeds = model.get_input_embeddings()(ids)
        inputs = torch.cat([features.pooler_output, embeds], dim=1)
        logits = model.language_model(inputs_embeds=inputs).logits
    stages = (features.last_hidden_state, features.pooler_output, embeds, logits)
    return dict(zip(("encoder", "connector", "embed_tokens", "llm"), stages, strict=True))


def assert_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for stage, tensor in theirs.items():
        difference = (ours[stage] - tensor).abs()
        assert torch.allclose(ours[stage], tensor, atol=ABSOLUTE, rtol=RELATIVE), (
            f"{stage}: max abs {difference.max():.3g}, mean {difference.mean():.3g}, at {int(difference.argmax())}"
        )


# How the directory is cut into files.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "opt": ({"text": "opt", "seed": 4}, {}),
    "opt whole": ({"text": "opt", "tie": False}, {"vision_apart": False, "language_apart": False}),
    "vicuna pickles": ({"text": "llama", "num_kv_heads": 2}, {"pickled": True, "language_model": "llm"}),
    "fp16": ({"text": "opt", "dtype": "float16"}, {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_stages_equal_transformers(tmp_path: Path, name: str) -> None:
    options, layout = LAYOUTS[name]
    source = write_blip2_checkpoint(tmp_path / "source", **options)
    path = write_lavis_checkpoint(tmp_path / "lavis", source, **layout)
    model = load_checkpoint(path, allow_pickle=bool(layout.get("pickled")))
    reference = Blip2ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    theirs = reference_outputs(reference)
    assert_equal(outputs(model), theirs)
    assert_equal(reference_outputs(transformers_model(model)), theirs)


def test_a_flan_t5_directory_reads_to_transformers_tensors(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = random_model("t5")
    randomize(model, 5)
    model.save_pretrained(source)
    path = write_lavis_checkpoint(tmp_path / "lavis", source, language_model="t5")
    assert "t5_proj.weight" in open_weight_file(path / "lavis.safetensors").entries
    found, state = read(path).weights, load_file(source / "model.safetensors")
    assert set(found.entries) == set(state)
    for name, tensor in found.read(state).items():
        assert torch.equal(tensor, state[name]), name


def test_retrieval_scores_equal_transformers(tmp_path: Path) -> None:
    source = write_retrieval_checkpoint(tmp_path / "source", seed=3)
    path = write_lavis_checkpoint(tmp_path / "lavis", source, vision_apart=False, language_apart=False)
    state = load_file(path / "lavis.safetensors")
    state |= {"temp": torch.tensor(0.07), "Qformer.cls.predictions.bias": torch.zeros(9)}
    save_file(state, path / "lavis.safetensors")
    model, reference = load_checkpoint(path), Blip2ForImageTextRetrieval.from_pretrained(source)
    ids = torch.randint(3, 300, (3, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    connector: Any = model.connector
    with torch.no_grad():
        embeds = model.encoder(pictures())
        theirs = {
            "contrast": reference(pictures(), **inputs).logits_per_image,
            "match": reference(pictures(), **inputs, use_image_text_matching_head=True).logits_per_image,
        }
        assert_equal({"contrast": connector.contrast(embeds, ids), "match": connector.match(embeds, ids)}, theirs)


@pytest.fixture(scope="module")
def lavis_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good LAVIS directory; copy it before changing it."""
    directory = tmp_path_factory.mktemp("lavis")
    source = write_blip2_checkpoint(directory / "source", text="opt")
    return write_lavis_checkpoint(directory / "lavis", source)


def test_pickles_need_leave(lavis_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "pickle"
    shutil.copytree(lavis_checkpoint, path)
    lavis_to_pickle(path)
    with pytest.raises(CheckpointError, match=r"lavis\.pth is a pickle checkpoint.*--allow-pickle"):
        load_checkpoint(path)
    ours, theirs = outputs(load_checkpoint(path, allow_pickle=True)), outputs(load_checkpoint(lavis_checkpoint))
    for stage in theirs:
        assert torch.equal(ours[stage], theirs[stage])


def test_parts_under_other_names(lavis_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "named"
    shutil.copytree(lavis_checkpoint, path)
    (path / "lavis.safetensors").rename(path / "blip2_pretrained_opt2.7b.safetensors")
    (path / "llm").rename(tmp_path / "opt-2.7b")
    names = {"weights": "blip2_pretrained_opt2.7b.safetensors", "language_model": str(tmp_path / "opt-2.7b")}
    (path / "lavis.json").write_text(json.dumps(names))
    model = load_checkpoint(path)
    assert torch.equal(outputs(model)["llm"], outputs(load_checkpoint(lavis_checkpoint))["llm"])
    assert {file.name for file in model.files} >= {"lavis.json", "blip2_pretrained_opt2.7b.safetensors", "config.json"}


def test_old_opt_files_leave_model_out(lavis_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "old"
    shutil.copytree(lavis_checkpoint, path)
    file = path / "llm" / "model.safetensors"
    edit_file(file, lambda s: [s.update({name.removeprefix("model."): s.pop(name)}) for name in list(s)])
    assert all(name.startswith("decoder.") for name in open_weights(path / "llm").entries)
    assert torch.equal(outputs(load_checkpoint(path))["llm"], outputs(load_checkpoint(lavis_checkpoint))["llm"])
