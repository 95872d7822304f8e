"""Small random checkpoints of the first Qwen-VL in its project's files.

Names and layouts are written down here a second time, from the project's modules, so that a wrong name map is found.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.checkpoints import SENTENCES, randomize

State = dict[str, Tensor]
SPECIAL = 3 + 205 + 9
AUTO_MAP = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}


@dataclass(frozen=True)
class QwenVl:
    """A written Qwen-VL: its directory, and torch's and transformers' modules with its weights."""

    path: Path
    vision: Any
    connector: Any
    language_model: Any


class Vision(nn.Module):
    """The encoder around torch's own Transformer layers, which norm first."""

    def __init__(self, width: int, layers: int, heads: int, patch: int, mlp_width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(256, width))
        self.ln_pre = nn.LayerNorm(width, eps=1e-6)
        options: dict[str, Any] = {"activation": "gelu", "layer_norm_eps": 1e-6, "batch_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, mlp_width, 0.0, norm_first=True, **options) for _ in range(layers)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.conv1(pixel_values)
        size = x.shape[-2:]
        grid = self.positional_embedding.reshape(1, 16, 16, -1).permute(0, 3, 1, 2)
        if size != (16, 16):
            grid = nn.functional.interpolate(grid, size=size, mode="bicubic", align_corners=False)
        x = self.ln_pre((x + grid).flatten(2).transpose(1, 2))
        for layer in self.layers:
            x = layer(x)
        embeds: Tensor = x
        return embeds


def write_ranks(path: Path) -> int:
    """`qwen.tiktoken` of a tokenizer trained on a few sentences; returns how many tokens it has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(bytes(byte_of[c] for c in token)).decode()} {rank}" for token, rank in vocabulary]
    path.write_text("\n".join(lines) + "\n")
    return len(lines)


def write_qwen_vl_checkpoint(
    directory: Path,
    *,
    chat: bool = False,
    width: int = 24,
    heads: int = 3,
    vision_layers: int = 2,
    mlp_ratio: float = 1.7,
    patch: int = 7,
    image_size: int = 28,
    queries: int = 4,
    hidden_size: int = 128,
    text_heads: int = 4,
    layers: int = 2,
    seq_length: int = 512,
    shards: int = 1,
    dtype: str = "float32",
    seed: int = 0,
) -> QwenVl:
    """A random Qwen-VL (`chat`: Qwen-VL-Chat) as its project stores it."""
    from tests.models.test_resampler import Reference

    directory.mkdir(parents=True)
    tokens = write_ranks(directory / "qwen.tiktoken")
    vision: Any = Vision(width, vision_layers, heads, patch, int(width * mlp_ratio))
    connector: Any = Reference(round(queries**0.5), hidden_size, hidden_size // 128, width)
    text: Any = Qwen2Config(
        vocab_size=tokens + SPECIAL + 3,
        hidden_size=hidden_size,
        intermediate_size=72,
        num_hidden_layers=layers,
        num_attention_heads=text_heads,
        num_key_value_heads=text_heads,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 9000.0, "rope_type": "default"},
        max_position_embeddings=seq_length,
        tie_word_embeddings=False,
        eos_token_id=[tokens] if not chat else [tokens, tokens + 1, tokens + 2],
        pad_token_id=tokens,
        bos_token_id=None,
    )
    language_model: Any = Qwen2ForCausalLM(text)
    for number, module in enumerate((vision, connector, language_model)):
        randomize(module, 7 * seed + number)
        module.to(getattr(torch, dtype)).float().eval()
    state = project_state(vision.state_dict(), connector.state_dict(), language_model.state_dict(), heads)
    _save(directory, {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}, shards)
    config = {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": AUTO_MAP,
        "model_type": "qwen",
        "hidden_size": hidden_size,
        "intermediate_size": 2 * 72,
        "num_attention_heads": text_heads,
        "kv_channels": hidden_size // text_heads,
        "num_hidden_layers": layers,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 9000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "scale_attn_weights": True,
        "seq_length": seq_length,
        "max_position_embeddings": 4 * seq_length,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": False,
        "vocab_size": text.vocab_size,
        "visual": {
            "heads": heads,
            "image_size": image_size,
            "image_start_id": tokens + SPECIAL - 3,
            "layers": vision_layers,
            "mlp_ratio": mlp_ratio,
            "n_queries": queries,
            "output_dim": hidden_size,
            "patch_size": patch,
            "width": width,
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    settings = {"chat_format": "chatml" if chat else "raw", "eos_token_id": tokens, "pad_token_id": tokens}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    names = {
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        "tokenizer_class": "QWenTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    # What would run if anything ran the checkpoint's code.
    for module in ("configuration_qwen", "modeling_qwen", "tokenization_qwen"):
        (directory / f"{module}.py").write_text(f"open({str(directory / 'ran')!r}, 'w').close()\n")
    return QwenVl(directory, vision, connector, language_model)


def project_state(vision: State, connector: State, language_model: State, heads: int) -> State:
    """The modules' weights under the project's names."""
    found: State = {f"transformer.visual.{name}": tensor for name, tensor in connector.items()}
    words = {"linear1": "mlp.c_fc", "linear2": "mlp.c_proj", "norm1": "ln_1", "norm2": "ln_2"}
    for name, tensor in vision.items():
        _, _, rest = name.partition("layers.")
        if not rest:
            found[f"transformer.visual.{name}"] = tensor
            continue
        layer, module, *part = rest.split(".")
        block = f"transformer.visual.transformer.resblocks.{layer}"
        if module == "self_attn" and part[0].startswith("in_proj_"):
            # [q of all heads, k, v] to [q, k, v of the first head, of the second, ...]
            pieces = [third.chunk(heads) for third in tensor.chunk(3)]
            fused = torch.cat([pieces[kind][head] for head in range(heads) for kind in range(3)])
            found[f"{block}.attn.in_proj.{part[0].removeprefix('in_proj_')}"] = fused
        elif module == "self_attn":
            found[".".join([block, "attn", *part])] = tensor
        else:
            found[".".join([block, words[module], *part])] = tensor
    return found | _project_text(language_model)


def _project_text(state: State) -> State:
    words = {
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.w1",
        "mlp.gate_proj": "mlp.w2",
        "mlp.down_proj": "mlp.c_proj",
    }
    found = {
        "transformer.wte.weight": state["model.embed_tokens.weight"],
        "transformer.ln_f.weight": state["model.norm.weight"],
        "lm_head.weight": state["lm_head.weight"],
        "transformer.h.0.attn.rotary_emb.inv_freq": torch.ones(4),
    }
    for name, tensor in state.items():
        if not name.startswith("model.layers."):
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        module, _, part = rest.rpartition(".")
        if module in words:
            found[f"transformer.h.{layer}.{words[module]}.{part}"] = tensor
        elif module == "self_attn.q_proj":
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"transformer.h.{layer}.attn.c_attn.{part}"] = torch.cat(parts)
    return found


def _save(directory: Path, state: State, shards: int) -> None:
    state = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = {name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(names.values()):
        save_file({name: state[name] for name, one in names.items() if one == file}, directory / file)
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
