"""Tiny checkpoints in the files of LAVIS and MiniGPT-4, with random weights.

Names are written down here a second time, from those projects' modules, so that a wrong name map is found.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.checkpoints import Blip2Spec, randomize, write_tokenizer

State = dict[str, Tensor]


def without_key_bias(state: State) -> State:
    """`state` with the keys' third of every fused bias at 0, as every model of LAVIS has it."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    for name, tensor in state.items():
        if name.endswith("self_attn.qkv.bias"):
            tensor[len(tensor) // 3 : 2 * len(tensor) // 3] = 0
    return state


def visual_encoder_state(state: State, prefix: str) -> State:
    """transformers' `vision_model.*` (`prefix`: what stands before the names) as EVA's `VisionTransformer` names it."""
    found: State = {}
    parts = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
    }
    modules = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn": "attn"}
    for name, tensor in state.items():
        if not name.startswith(prefix) or "post_layernorm" in name:
            continue
        words = name.removeprefix(prefix)
        if words in parts:
            found[parts[words]] = tensor
            continue
        _, _, layer, module, *rest = words.split(".")
        block = f"blocks.{layer}.{modules.get(module, module)}"
        if rest == ["qkv", "bias"]:
            found[f"{block}.q_bias"], _, found[f"{block}.v_bias"] = (part.clone() for part in tensor.chunk(3))
        else:
            found[".".join([block, *rest]).replace("projection", "proj")] = tensor
    return found


def qformer_state(state: State, prefix: str) -> State:
    """transformers' Q-Former (`prefix` before `encoder.layer`) as LAVIS' `Qformer` names it."""
    found: State = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            continue
        words = name.removeprefix(prefix)
        if words.startswith("layernorm."):
            words = words.replace("layernorm.", "embeddings.LayerNorm.")
        found[f"Qformer.bert.{words}".replace("attention.attention.", "attention.self.")] = tensor
    return found


def lavis_state(state: State, language_model: str) -> State:
    """transformers' BLIP-2 `state` as LAVIS' `model.state_dict()` has it."""
    found = {f"visual_encoder.{name}": tensor for name, tensor in visual_encoder_state(state, "vision_model.").items()}
    found |= qformer_state(state, "qformer.")
    plain = {
        "vision_model.post_layernorm.": "ln_vision.",
        "query_tokens": "query_tokens",
        "embeddings.": "Qformer.bert.embeddings.",
        "vision_projection.": "vision_proj.",
        "text_projection.": "text_proj.",
        "itm_head.": "itm_head.",
        "language_projection.": f"{language_model}_proj.",
        "language_model.": f"{language_model}_model.",
    }
    for name, tensor in state.items():
        for theirs, lavis in plain.items():
            if name.startswith(theirs):
                found[lavis + name.removeprefix(theirs)] = tensor
    return found


def write_lavis_checkpoint(
    directory: Path,
    source: Path,
    *,
    language_model: str = "opt",
    pickled: bool = False,
    vision_apart: bool = True,
    language_apart: bool = True,
) -> Path:
    """The transformers checkpoint `source` in LAVIS' files. The keys' biases, which LAVIS lacks, become 0 in both."""
    state = without_key_bias(load_file(source / "model.safetensors"))
    (source / "model.safetensors").unlink()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    lavis = lavis_state(state, language_model)
    lavis |= {"Qformer.bert.embeddings.position_ids": torch.arange(4)[None]}
    if vision_apart:
        vision = {name: tensor for name, tensor in lavis.items() if name.startswith("visual_encoder.")}
        lavis = {name: tensor for name, tensor in lavis.items() if name not in vision}
        plain = {name.removeprefix("visual_encoder."): tensor for name, tensor in vision.items()}
        _save(_with_last_block(plain), directory / "eva_vit_g", pickled, whole=False)
    if language_apart:
        text = {name: tensor for name, tensor in lavis.items() if name.startswith(f"{language_model}_model.")}
        lavis = {name: tensor for name, tensor in lavis.items() if name not in text}
        config = json.loads((source / "config.json").read_text())["text_config"]
        (directory / "llm").mkdir()
        (directory / "llm" / "config.json").write_text(json.dumps(config))
        plain = {name.removeprefix(f"{language_model}_model."): tensor for name, tensor in text.items()}
        save_file(plain, directory / "llm" / "model.safetensors", metadata={"format": "pt"})
    _save(lavis, directory / "lavis", pickled, whole=True)
    return directory


def _with_last_block(vision: State) -> State:
    """EVA's file has one block more than BLIP-2 runs, and a norm and a head after it."""
    count = 1 + max(int(name.split(".")[1]) for name in vision if name.startswith("blocks."))
    last = {
        name.replace("blocks.0.", f"blocks.{count}."): torch.ones_like(tensor)
        for name, tensor in vision.items()
        if name.startswith("blocks.0.")
    }
    return {**vision, **last, "norm.weight": torch.ones(4), "head.bias": torch.ones(2)}


def _save(state: State, stem: Path, pickled: bool, *, whole: bool) -> None:
    """Safetensors, or the pickle that a trainer writes (`whole`: with what stands beside the model)."""
    state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    if not pickled:
        save_file(state, stem.with_suffix(".safetensors"))
        return
    content: Any = {"model": state, "epoch": 4, "config": {"run": {"lr": 1e-4}}} if whole else state
    torch.save(content, stem.with_suffix(".pth"))


def edit_file(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Let `change` change the tensors of one safetensors file."""
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(state)
    save_file(state, file)


def lavis_to_pickle(path: Path) -> Path:
    """Store `lavis.safetensors` as `lavis.pth` instead; returns that."""
    file = path / "lavis.safetensors"
    torch.save({"model": load_file(file)}, path / "lavis.pth")
    file.unlink()
    return path / "lavis.pth"


@dataclass(frozen=True)
class MiniGpt4:
    """A written MiniGPT-4: its directory, and transformers' modules with its weights."""

    path: Path
    vision: Any
    qformer: Any
    query_tokens: Tensor
    projection: nn.Linear
    language_model: Any


def write_minigpt4_checkpoint(
    directory: Path, *, pickled: bool = False, vision_apart: bool = True, dtype: str = "float32", **options: Any
) -> MiniGpt4:
    """A random MiniGPT-4 in its project's files; `options` are fields of `Blip2Spec`."""
    spec = Blip2Spec(**options)
    vicuna = directory / "vicuna"
    vicuna.mkdir(parents=True)
    tokenizer = write_tokenizer(vicuna, text="llama")
    text: Any = spec.text_config(tokenizer)
    vision_config = Blip2VisionConfig(**spec.vision_config())
    blip2: Any = Blip2Config(
        vision_config=vision_config.to_dict(),
        qformer_config=spec.qformer_config() | {"encoder_hidden_size": spec.vision_hidden_size},
        text_config=text.to_dict(),
    )
    kind = getattr(torch, dtype)
    vision: Any = Blip2VisionModel(vision_config)
    qformer: Any = Blip2QFormerModel(Blip2QFormerConfig(**blip2.qformer_config.to_dict()))
    projection = nn.Linear(spec.qformer_hidden_size, spec.hidden_size)
    language_model: Any = LlamaForCausalLM(LlamaConfig(**text.to_dict()))
    for module in (vision, qformer, projection, language_model):
        randomize(module, spec.seed)
        module.to(kind)
    vision.load_state_dict(without_key_bias(vision.state_dict()))
    shape = (1, spec.num_query_tokens, spec.qformer_hidden_size)
    queries = torch.randn(shape, generator=torch.Generator().manual_seed(spec.seed)).to(kind)

    encoder = visual_encoder_state(vision.state_dict(), "")
    norm = {f"ln_vision.{part}": getattr(vision.post_layernorm, part).detach() for part in ("weight", "bias")}
    blip = {
        **qformer_state(qformer.state_dict(), ""),
        **norm,
        "query_tokens": queries,
        # BLIP-2's own projection, into another language model.
        "t5_proj.weight": torch.zeros(7, spec.qformer_hidden_size),
        "t5_proj.bias": torch.zeros(7),
    }
    if not vision_apart:
        blip |= {f"visual_encoder.{name}": tensor for name, tensor in encoder.items()}
    else:
        _save(_with_last_block(encoder), directory / "eva_vit_g", pickled, whole=False)
    _save(blip, directory / "blip2_pretrained_flant5xxl", pickled, whole=True)
    trained = {f"llama_proj.{part}": getattr(projection, part).detach() for part in ("weight", "bias")}
    _save(trained, directory / "minigpt4", pickled, whole=True)
    language_model.save_pretrained(vicuna)
    parts = {
        "vision_layers": spec.vision_layers,
        "vision_heads": spec.vision_heads,
        "qformer_heads": spec.qformer_heads,
    }
    (directory / "minigpt4.json").write_text(json.dumps(parts))
    # Read again: a module that was in FP16 once keeps rotary frequencies of FP16.
    language_model = LlamaForCausalLM.from_pretrained(vicuna, dtype=torch.float32)
    modules = [module.float().eval() for module in (vision, qformer, projection, language_model)]
    return MiniGpt4(directory, modules[0], modules[1], queries.float(), modules[2], modules[3])
