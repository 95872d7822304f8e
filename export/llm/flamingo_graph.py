"""Flamingo's language model as a graph: one or more new tokens over a cache, and over keys and values of pictures.

Self-attention is GroupQueryAttention (com.microsoft, ContribOperators.md): it writes the cache in place, turns queries
and keys by their positions, and reads up to each row's length. Cross-attention is plain MatMul and Softmax over what
the stage `cross_kv` gave, read where it lies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.contract import KvCacheContract, StageContract
from ...models.flamingo_contract import FlamingoContract
from ..passes.gqa import CONTRIB
from .traced import trace_decoder_graph

if TYPE_CHECKING:
    from ...models.idefics import FlamingoDecoder

# The traced example; all different and at least 2, so that no axis is baked in or taken for another.
_BATCH, _TOKENS, _TOTAL, _CAPACITY, _IMAGES = 2, 3, 7, 11, 5
Pair = tuple[Tensor, Tensor]


class FlamingoDecoderGraph(nn.Module):
    """The stage `llm` with its operators of ONNX Runtime; it can be traced and not run."""

    def __init__(self, stage: FlamingoDecoder, cache: KvCacheContract, contract: FlamingoContract) -> None:
        super().__init__()
        # Under the stage's own names, so that the graph's module stacks are its.
        self.layers, self.gated_cross_attn_layers = stage.layers, stage.gated_cross_attn_layers
        self.norm, self.lm_head = stage.norm, stage.lm_head
        self.interval: int = stage.config.cross_layer_interval
        self.cache = cache
        self.contract = contract
        # The operator turns queries and keys by itself, but only heads whose size it likes.
        self.turns_inside = contract.cross_cache.head_size % 16 == 0
        cos, sin = stage.rotary_tables()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        logits_position: Tensor,
        image_attention_mask: Tensor,
        cross: list[Tensor],
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """`logits` `[B, V]` and the cache after these tokens.

        `inputs_embeds` `[B, S, D]`; `attention_mask` `[B, T]`, whose row sums are the rows' lengths with the new
        tokens; `logits_position` `[B]` into `S`; `image_attention_mask` `[B, S, images]`; `cross` `[B, heads, images
        * latents, size]` and `past` `[B, heads, capacity, size]`, two of each for a layer.
        """
        from ...models.idefics import cross_attend, feed_forward, picture_mask
        from ...models.t5 import rms_norm

        lengths = self._row_lengths(attention_mask)
        tables = self._tables(inputs_embeds, attention_mask)
        seen = picture_mask(image_attention_mask, self.contract.latents)
        hidden, present = inputs_embeds, []
        for i, layer in enumerate(self.layers):
            at, skipped = divmod(i, self.interval)
            if not skipped:
                hidden = cross_attend(self.gated_cross_attn_layers[at], hidden, cross[2 * at : 2 * at + 2], *seen)
            parts: Any = layer
            states, *written = self._attend(
                parts.self_attn, rms_norm(parts.input_layernorm, hidden), past[2 * i : 2 * i + 2], lengths, tables
            )
            present += written
            hidden = hidden + states
            hidden = hidden + feed_forward(parts, hidden)
        hidden = rms_norm(self.norm, hidden)
        last = hidden.gather(1, logits_position[:, None, None].expand(-1, 1, hidden.shape[2]))
        return self.lm_head(last)[:, 0], *present

    def _attend(
        self, attention: Any, hidden: Tensor, past: list[Tensor], lengths: Pair, tables: Pair
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (project(hidden) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        if not self.turns_inside:
            query, key = (self._turn(states, *tables) for states in (query, key))
        query, key, value = (self._pad(states) for states in (query, key, value))
        attended, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            f"{CONTRIB}::GroupQueryAttention",
            (query, key, value, *past, *lengths, *(tables if self.turns_inside else ())),
            {
                "num_heads": self.cache.num_heads,
                "kv_num_heads": self.cache.num_heads,
                "scale": attention.scaling,
                "do_rotary": int(self.turns_inside),
            },
            dtypes=(query.dtype, past[0].dtype, past[1].dtype),
            shapes=(query.shape, past[0].shape, past[1].shape),
            version=1,
        )
        return attention.o_proj(self._unpad(attended)), present_key, present_value

    def _tables(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Pair:
        """Cosine and sine: of all positions for the operator, or of the new tokens, `[B, S, 1, head_size / 2]`."""
        cos, sin = self.get_buffer("cos"), self.get_buffer("sin")
        if self.turns_inside:
            return cos, sin
        # New tokens begin at 0 when the mask is no wider than they are, else they end at the row's last position.
        first = attention_mask.sum(1) - inputs_embeds.shape[1]
        first = first * (attention_mask.shape[1] != inputs_embeds.shape[1])
        positions = first[:, None] + torch.arange(inputs_embeds.shape[1])
        return cos[positions][:, :, None], sin[positions][:, :, None]

    def _turn(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of `[B, S, heads * size]`, halves as pairs."""
        left, right = self._heads(states).chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).flatten(2)

    def _pad(self, states: Tensor) -> Tensor:
        """Zeros behind each head, up to the size that the operator takes: they change no score."""
        missing = self.cache.head_size - self.contract.cross_cache.head_size
        return F.pad(self._heads(states), (0, missing)).flatten(2) if missing else states

    def _unpad(self, states: Tensor) -> Tensor:
        size = self.contract.cross_cache.head_size
        return states if self.cache.head_size == size else self._heads(states)[..., :size].flatten(2)

    def _heads(self, states: Tensor) -> Tensor:
        batch, length, width = states.shape
        return states.view(batch, length, self.cache.num_heads, width // self.cache.num_heads)

    def _row_lengths(self, attention_mask: Tensor) -> Pair:
        """`seqlens_k` `[B]`, each row's last position, and the scalar width of the mask, both int32."""
        last = (attention_mask.sum(1) - 1).to(torch.int32)
        return last, torch.scalar_tensor(attention_mask.shape[1], dtype=torch.int32)


def trace_flamingo(
    stage: FlamingoDecoder, contract: StageContract, cache: KvCacheContract, flamingo: FlamingoContract
) -> ir.Model:
    """The graph of `llm` with the contract's names, not yet passed through anything.

    Raises ExportError when torch.onnx cannot trace it.
    """
    batch, sequence, total, images = (
        torch.export.Dim(axis.name, min=axis.min, max=axis.max)
        for axis in contract.axes
        if axis.name != "image_sequence"
    )
    capacity = torch.export.Dim("past_sequence", min=1, max=contract.axis("total_sequence").max)
    shapes = (
        {0: batch, 1: sequence},
        {0: batch, 1: total},
        {0: batch},
        {0: batch, 1: sequence, 2: images},
        [{0: batch, 2: flamingo.latents * images}] * (2 * flamingo.cross_cache.num_layers),
        [{0: batch, 2: capacity}] * (2 * cache.num_layers),
    )
    module = FlamingoDecoderGraph(stage, cache, flamingo)
    return trace_decoder_graph(
        module,
        _example(contract, cache, flamingo),
        shapes,
        contract,
        cache,
        what="this Idefics decoder",
        needed="another checkpoint",
    )


def _example(contract: StageContract, cache: KvCacheContract, flamingo: FlamingoContract) -> tuple[Any, ...]:
    sizes = {
        "batch": _BATCH,
        "sequence": _TOKENS,
        "total_sequence": _TOTAL,
        "images": _IMAGES,
        "image_sequence": _IMAGES * flamingo.latents,
    }
    embeds, _, position, _, *cross = (
        torch.zeros(
            [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape], dtype=getattr(torch, spec.dtype)
        )
        for spec in contract.inputs
    )
    past = [torch.zeros(_BATCH, cache.num_heads, _CAPACITY, cache.head_size) for _ in range(2 * cache.num_layers)]
    mask = torch.ones(_BATCH, _TOTAL, dtype=torch.int64)
    seen = torch.ones(_BATCH, _TOKENS, _IMAGES, dtype=torch.int64)
    return embeds, mask, position, seen, cross, past
