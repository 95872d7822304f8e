"""T5's decoder as a graph: one or more new tokens over two caches.

Its own cache is a buffer that GroupQueryAttention (com.microsoft, ContribOperators.md) writes in place and reads up to
each row's length, the relative position bias added to the scores. The prompt's keys and values come from the stage
`llm_encoder` and are read where they lie: plain MatMul and Softmax, in which ONNX Runtime transposes on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.contract import KvCacheContract, StageContract
from ...models.seq2seq_contract import CrossCacheContract
from ..passes.gqa import CONTRIB
from .traced import trace_decoder_graph

if TYPE_CHECKING:
    from ...models.t5 import T5LanguageDecoder

# The traced example; all different and at least 2, so that no axis is baked in or taken for another.
_BATCH, _TOKENS, _TOTAL, _CAPACITY, _PROMPT = 2, 3, 7, 11, 5


class T5DecoderGraph(nn.Module):
    """The stage `llm` with its operators of ONNX Runtime; it can be traced and not run."""

    def __init__(self, stage: T5LanguageDecoder, cache: KvCacheContract, cross: CrossCacheContract) -> None:
        super().__init__()
        # Under the stage's own names, so that the graph's module stacks are its.
        self.decoder, self.lm_head = stage.decoder, stage.lm_head
        self._position_bias = stage.position_bias
        self.cache = cache
        self.cross = cross

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        logits_position: Tensor,
        encoder_attention_mask: Tensor,
        cross: list[Tensor],
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """`logits` `[B, V]` and the cache after these tokens.

        `inputs_embeds` `[B, S, D]`; `attention_mask` `[B, T]`, whose row sums are the rows' lengths with the new
        tokens; `logits_position` `[B]` into `S`; `encoder_attention_mask` `[B, E]`; `cross` `[B, heads, E, size]`
        and `past` `[B, heads, capacity, size]`, two of each for a layer.
        """
        from ...models.t5 import padding_bias, rms_norm, run_feed_forward

        lengths = self._row_lengths(attention_mask)
        bias = self._position_bias(self._distances(inputs_embeds, attention_mask))
        padding, hidden, present = padding_bias(encoder_attention_mask), inputs_embeds, []
        for i, block in enumerate(self.decoder.block):
            layer, cross_layer, feed_forward = block.layer
            states, *written = self._attend_self(
                layer.SelfAttention, rms_norm(layer.layer_norm, hidden), past[2 * i : 2 * i + 2], lengths, bias
            )
            present += written
            hidden = hidden + states
            normed = rms_norm(cross_layer.layer_norm, hidden)
            hidden = hidden + self._attend_prompt(
                cross_layer.EncDecAttention, normed, cross[2 * i : 2 * i + 2], padding
            )
            hidden = hidden + run_feed_forward(feed_forward, hidden)
        hidden = rms_norm(self.decoder.final_layer_norm, hidden)
        last = hidden.gather(1, logits_position[:, None, None].expand(-1, 1, hidden.shape[2]))
        if self.decoder.config.scale_decoder_outputs:
            last = last * self.decoder.config.d_model**-0.5
        return self.lm_head(last)[:, 0], *present

    def _attend_self(
        self, attention: Any, hidden: Tensor, past: list[Tensor], lengths: tuple[Tensor, Tensor], bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (self._pad(project(hidden)) for project in (attention.q, attention.k, attention.v))
        attended, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            f"{CONTRIB}::GroupQueryAttention",
            (query, key, value, *past, *lengths, None, None, None, bias),
            {"num_heads": self.cache.num_heads, "kv_num_heads": self.cache.num_heads, "scale": 1.0},
            dtypes=(query.dtype, past[0].dtype, past[1].dtype),
            shapes=(query.shape, past[0].shape, past[1].shape),
            version=1,
        )
        return attention.o(self._unpad(attended)), present_key, present_value

    def _attend_prompt(self, attention: Any, hidden: Tensor, cross: list[Tensor], padding: Tensor) -> Tensor:
        from ...models.t5 import attend, split_heads

        query = split_heads(attention.q(hidden), self.cross.num_heads)
        output: Tensor = attention.o(attend(query, cross[0], cross[1], padding))
        return output

    def _pad(self, states: Tensor) -> Tensor:
        """Zeros behind each head, up to the size that the operator takes: they change no score."""
        missing = self.cache.head_size - self.cross.head_size
        return F.pad(self._heads(states), (0, missing)).flatten(2) if missing else states

    def _unpad(self, states: Tensor) -> Tensor:
        if self.cache.head_size == self.cross.head_size:
            return states
        return self._heads(states)[..., : self.cross.head_size].flatten(2)

    def _heads(self, states: Tensor) -> Tensor:
        batch, length, width = states.shape
        return states.view(batch, length, self.cross.num_heads, width // self.cross.num_heads)

    def _row_lengths(self, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """`seqlens_k` `[B]`, each row's last position, and the scalar width of the mask, both int32."""
        last = (attention_mask.sum(1) - 1).to(torch.int32)
        return last, torch.scalar_tensor(attention_mask.shape[1], dtype=torch.int32)

    def _distances(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, S, T]`: how far each position of the cache lies before each new token.

        New tokens begin at 0 when the mask is no wider than they are, else they end at the row's last position.
        """
        tokens, width = torch.arange(inputs_embeds.shape[1]), torch.arange(attention_mask.shape[1])
        first = attention_mask.sum(1) - inputs_embeds.shape[1]
        first = first * (attention_mask.shape[1] != inputs_embeds.shape[1])
        return (first[:, None] + tokens)[:, :, None] - width


def trace_decoder(
    stage: T5LanguageDecoder, contract: StageContract, cache: KvCacheContract, cross: CrossCacheContract
) -> ir.Model:
    """The graph of `llm` with the contract's names, not yet passed through anything.

    Raises ExportError when torch.onnx cannot trace it.
    """
    inputs = _example(contract, cache)
    batch, sequence, total, prompt = (torch.export.Dim(axis.name, min=axis.min, max=axis.max) for axis in contract.axes)
    capacity = torch.export.Dim("past_sequence", min=1, max=contract.axis("total_sequence").max)
    shapes = (
        {0: batch, 1: sequence},
        {0: batch, 1: total},
        {0: batch},
        {0: batch, 1: prompt},
        [{0: batch, 2: prompt}] * (2 * cross.num_layers),
        [{0: batch, 2: capacity}] * (2 * cache.num_layers),
    )
    module = T5DecoderGraph(stage, cache, cross)
    return trace_decoder_graph(
        module, inputs, shapes, contract, cache, what="this T5 decoder", needed="another text model"
    )


def _example(contract: StageContract, cache: KvCacheContract) -> tuple[Any, ...]:
    sizes = {"batch": _BATCH, "sequence": _TOKENS, "total_sequence": _TOTAL, "encoder_sequence": _PROMPT}
    embeds, _, position, _, *cross = (
        torch.zeros(
            [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape], dtype=getattr(torch, spec.dtype)
        )
        for spec in contract.inputs
    )
    past = [torch.zeros(_BATCH, cache.num_heads, _CAPACITY, cache.head_size) for _ in range(2 * cache.num_layers)]
    masks = (torch.ones(_BATCH, length, dtype=torch.int64) for length in (_TOTAL, _PROMPT))
    mask, encoder_mask = masks
    return embeds, mask, position, encoder_mask, cross, past
