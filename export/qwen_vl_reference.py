"""The first Qwen-VL put together of torch's and transformers' modules: what parity holds a bundle against.

Nothing of ours takes part but the config: tensors come from the files under the project's names, and prompts are
tokenised by the ranks themselves, in the steps of the project's `make_context`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BatchFeature, Qwen2ForCausalLM
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from ..models.qwen_vl import chat_format
from ..models.weights import open_weights
from .qwen_vl import IMAGE_MARKS, KEPT, PATTERN, SYSTEM, load_ranks, special_tokens
from .tiktoken_bpe import encode_by_ranks, tokenizer_from_ranks

if TYPE_CHECKING:
    from ..models.checkpoint import VisionLanguageModel

_EPS = 1e-6
State = Mapping[str, Tensor]


class VisionModel(nn.Module):
    """Patches, positions and CLIP's layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(256, width))
        self.ln_pre = nn.LayerNorm(width, eps=_EPS)
        self.layers: Any = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, 3, S, S]` to `[B, N, Dv]`."""
        x = self.conv1(pixel_values).flatten(2).permute(0, 2, 1)
        x = self.ln_pre(x + _positions(self.positional_embedding, x.shape[1]))
        for layer in self.layers:
            x = layer(x, None)
        embeds: Tensor = x
        return embeds


class Connector(nn.Module):
    """The resampler around torch's own attention."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, vision_width = config.text_config.hidden_size, config.vision_config.hidden_size
        pool: Any = nn.Module()
        pool.query = nn.Parameter(torch.zeros(config.image_seq_length, width))
        pool.pos_embed = nn.Parameter(torch.zeros(config.image_seq_length, width))
        pool.kv_proj = nn.Identity() if vision_width == width else nn.Linear(vision_width, width, bias=False)
        pool.ln_q, pool.ln_kv = nn.LayerNorm(width, eps=_EPS), nn.LayerNorm(width, eps=_EPS)
        pool.attn = nn.MultiheadAttention(width, width // 128, batch_first=True)
        self.attn_pool: Any = pool
        self.ln_post = nn.LayerNorm(width, eps=_EPS)
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`[B, N, Dv]` to `[B, Q, D]`."""
        pool = self.attn_pool
        values = pool.ln_kv(pool.kv_proj(image_embeds))
        keys = values + _positions(pool.pos_embed, values.shape[1])
        # A reduction leaves the first queries.
        queries = pool.ln_q(pool.query) + pool.pos_embed[: len(pool.query)]
        read = pool.attn(queries.expand(len(values), -1, -1), keys, values, need_weights=False)[0]
        features: Tensor = self.ln_post(read) @ self.proj
        return features


class QwenVlReference(nn.Module):
    """The whole model."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config.vision_config)
        self.connector = Connector(config)
        make: Any = Qwen2ForCausalLM
        self.language_model: Any = make._from_config(config.text_config, attn_implementation="eager")

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.language_model.get_input_embeddings()
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.language_model.get_output_embeddings()
        return head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> Any:
        """Ids `[B, S]` with an image token for every feature, and the pictures `[P, 3, H, W]` in their order."""
        return self.language_model(inputs_embeds=self._merge(input_ids, pixel_values), attention_mask=attention_mask)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """New tokens `[B, T]`; `options` as transformers' `generate` has them."""
        return self.language_model.generate(
            inputs_embeds=self._merge(input_ids, pixel_values), attention_mask=attention_mask, **options
        )

    def _merge(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeds
        features = self.connector(self.vision_model(pixel_values))
        places = (input_ids == self.config.image_token_id)[..., None].expand_as(embeds)
        return embeds.masked_scatter(places, features)


def load_model(model: VisionLanguageModel) -> QwenVlReference:
    """The model with the weights of the directory, FP32."""
    config = model.config
    config.vision_config._attn_implementation = "eager"
    reference = QwenVlReference(config)
    weights = open_weights(model.path, allow_pickle=True)
    state = weights.read(weights.entries)
    reference.load_state_dict(reference_state(state, config.vision_config.num_attention_heads), strict=True)
    return reference.eval().requires_grad_(False)


def reference_state(state: State, heads: int) -> dict[str, Tensor]:
    """The project's tensors under the names of `QwenVlReference`."""
    words = {
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_proj": "mlp.down_proj",
        # a1 * silu(a2), a1 = w1(x) and a2 = w2(x)
        "mlp.w1": "mlp.up_proj",
        "mlp.w2": "mlp.gate_proj",
    }
    found = {
        "language_model.model.embed_tokens.weight": state["transformer.wte.weight"],
        "language_model.model.norm.weight": state["transformer.ln_f.weight"],
        "language_model.lm_head.weight": state["lm_head.weight"],
    }
    for name, tensor in state.items():
        if name.startswith("transformer.visual."):
            found |= _vision(name.removeprefix("transformer.visual."), tensor, heads)
        elif name.startswith("transformer.h."):
            layer, _, rest = name.removeprefix("transformer.h.").partition(".")
            module, _, part = rest.rpartition(".")
            block = f"language_model.model.layers.{layer}"
            if module == "attn.c_attn":
                width = len(tensor) // 3
                for place, letter in enumerate("qkv"):
                    found[f"{block}.self_attn.{letter}_proj.{part}"] = tensor[place * width : (place + 1) * width]
            elif module in words:
                found[f"{block}.{words[module]}.{part}"] = tensor
    return found


def _vision(name: str, tensor: Tensor, heads: int) -> dict[str, Tensor]:
    if name.startswith(("attn_pool.", "ln_post.")) or name == "proj":
        return {f"connector.{name}": tensor}
    if not name.startswith("transformer.resblocks."):
        return {f"vision_model.{name}": tensor}
    layer, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
    block = f"vision_model.layers.{layer}"
    if rest.startswith("attn.in_proj."):
        # Head by head: its queries, its keys, its values.
        size = len(tensor) // heads // 3
        rows = torch.arange(len(tensor)).view(heads, 3, size)
        part = rest.rpartition(".")[2]
        return {
            f"{block}.self_attn.{letter}_proj.{part}": tensor[rows[:, place].flatten()]
            for place, letter in enumerate("qkv")
        }
    words = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    module, _, part = rest.rpartition(".")
    return {f"{block}.{words.get(module, module.replace('attn.', 'self_attn.'))}.{part}": tensor}


def _positions(positions: Tensor, count: int) -> Tensor:
    """The project's `get_abs_pos`: `[M * M, D]` resized for `count` tokens of another square."""
    old, new = math.isqrt(len(positions)), math.isqrt(count)
    if old == new:
        return positions
    grid = positions.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def load_processor(model: VisionLanguageModel) -> ReferenceProcessor:
    """The processor of the directory."""
    return ReferenceProcessor(model.path, model.config, chat_format(model.path) == "chatml")


class ReferenceProcessor:
    """The project's picture transform (as transformers' processor of the same steps), and its prompts by the ranks."""

    def __init__(self, path: Path, config: Any, chat: bool) -> None:
        from transformers import PreTrainedTokenizerFast
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        size = config.vision_config.image_size
        self.image_processor: Any = BlipImageProcessorPil(size={"height": size, "width": size})
        self.ranks = load_ranks(path, config)
        names = special_tokens()
        tokenizer = tokenizer_from_ranks(self.ranks, PATTERN, [(name, name not in KEPT) for name in names])
        make: Any = PreTrainedTokenizerFast
        self.tokenizer: Any = make(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
        self.image_token = IMAGE_MARKS[2]
        self._ids = {name: len(self.ranks) + place for place, name in enumerate(names)}
        self.num_query_tokens: int = config.image_seq_length
        self._chat = chat

    def __call__(self, images: Any, text: str, return_tensors: str | None = None, **options: Any) -> Any:
        """`pixel_values` `[P, 3, H, W]`, `input_ids` and `attention_mask` `[1, S]` for one prompt and one picture, a
        list of them, or none.
        """
        pictures = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        ids = self._prompt(text, len(pictures))
        data: dict[str, Any] = {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}
        if pictures:
            made = [self.image_processor(one, return_tensors="np", **options)["pixel_values"][0] for one in pictures]
            data["pixel_values"] = made
        return BatchFeature(data, tensor_type=return_tensors)

    def _prompt(self, text: str, pictures: int) -> list[int]:
        start, end, pad = (self._ids[mark] for mark in IMAGE_MARKS)
        # A picture's mark ends what stands before it, so the texts between are tokenised apart.
        content: list[int] = []
        between = ""
        for number in range(1, pictures + 1):
            content += [*self._encode(f"{between}Picture {number}: "), start, *([pad] * self.num_query_tokens), end]
            between = "\n"
        content += self._encode(between + text)
        if not self._chat:
            return content
        newline = self._plain("\n")
        opened, closed = self._ids["<|im_start|>"], self._ids["<|im_end|>"]
        ids = [opened, *self._plain("system"), *newline, *self._plain(SYSTEM), closed, *newline]
        ids += [opened, *self._plain("user"), *newline, *content, closed, *newline]
        return [*ids, opened, *self._plain("assistant"), *newline]

    def _encode(self, text: str) -> list[int]:
        """The special tokens that a user may write are those of places, and of a plain text all but pictures'."""
        known = [name for name in self._ids if name in KEPT or (name not in IMAGE_MARKS and not self._chat)]
        ids: list[int] = []
        for piece in regex.split(f"({'|'.join(regex.escape(name) for name in known)})", text):
            ids += [self._ids[piece]] if piece in known else self._plain(piece)
        return ids

    def _plain(self, text: str) -> list[int]:
        return encode_by_ranks(self.ranks, PATTERN, text)
