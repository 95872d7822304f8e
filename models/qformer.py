"""BLIP-2's Q-Former: learned queries that read an image encoder's tokens, beside a text transformer.

Li et al. 2023, "BLIP-2" (arXiv 2301.12597), section 3.1: one BERT-like transformer whose self-attention is
shared by queries and text; every ``cross_attention_frequency`` layers the queries, and only they,
cross-attend to the image; queries and text have their own feed-forwards. The self-attention mask says which of
them see each other (figure 2).

The weights equal those of transformers' ``Blip2QFormerModel``: :func:`transformers_names` maps them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, InputError
from .attention import CrossAttention, additive_mask

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class SelfAttentionMask(enum.Enum):
    """Who sees whom in the shared self-attention (BLIP-2, figure 2)."""

    UNIMODAL = "unimodal"
    """Image-text contrast: queries see queries, text sees text."""
    BIDIRECTIONAL = "bidirectional"
    """Image-text matching: everyone sees everyone."""
    MULTIMODAL_CAUSAL = "multimodal-causal"
    """Image-grounded text generation: queries see queries; text sees queries and the text up to itself."""

    def keep(self, num_queries: int, num_text: int, device: torch.device | None = None) -> Tensor:
        """bool ``[Q + T, Q + T]``, rows see columns, queries first."""
        length = num_queries + num_text
        if self is SelfAttentionMask.BIDIRECTIONAL:
            return torch.ones(length, length, dtype=torch.bool, device=device)
        is_text = torch.arange(length, device=device) >= num_queries
        if self is SelfAttentionMask.UNIMODAL:
            return is_text[:, None] == is_text[None, :]
        # Below the diagonal text sees all that comes before it, queries included; queries see all queries.
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return causal | ~(is_text[:, None] | is_text[None, :])


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """Sizes of a Q-Former. The defaults are those of BLIP-2.

    ``text``: whether the text branch (embeddings and text feed-forwards) is built. Checkpoints of
    ``Blip2ForConditionalGeneration`` have none; those for retrieval do. There is no dropout.
    """

    num_query_tokens: int = 32
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    encoder_hidden_size: int = 1408
    cross_attention_frequency: int = 2
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    text: bool = False
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        sizes = (
            "num_query_tokens",
            "hidden_size",
            "num_layers",
            "num_heads",
            "intermediate_size",
            "encoder_hidden_size",
            "cross_attention_frequency",
            "vocab_size",
            "max_position_embeddings",
        )
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CheckpointError(f"Q-Former config: {name} is {value!r}; it must be a whole number above 0")
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"Q-Former config: hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}"
            )
        if self.activation not in ACTIVATIONS:
            raise CheckpointError(
                f"Q-Former config: activation {self.activation!r} is unknown; known are {', '.join(ACTIVATIONS)}"
            )
        if not self.layer_norm_eps > 0:
            raise CheckpointError(f"Q-Former config: layer_norm_eps is {self.layer_norm_eps}; above 0 is needed")

    @classmethod
    def from_transformers(cls, qformer_config: Mapping[str, Any], num_query_tokens: int) -> QFormerConfig:
        """Read the ``qformer_config`` of a ``config.json`` (absent keys: transformers' defaults)."""
        renamed = {
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "activation": "hidden_act",
            "text": "use_qformer_text_input",
        }
        names = {name: renamed.get(name, name) for name in cls.__dataclass_fields__}
        del names["num_query_tokens"]  # stands beside the qformer_config, not in it
        found = {ours: qformer_config[theirs] for ours, theirs in names.items() if theirs in qformer_config}
        return cls(num_query_tokens=num_query_tokens, **found)

    def has_cross_attention(self, layer: int) -> bool:
        """Whether the ``layer``-th layer (from 0) reads the image."""
        return layer % self.cross_attention_frequency == 0


@dataclass(frozen=True)
class QFormerOutput:
    """What a Q-Former gives back. The attention maps are empty unless they were asked for.

    ``query_embeds`` ``[B, Q, D]`` (None for text alone), ``text_embeds`` ``[B, T, D]`` (None without text),
    ``self_attention``: one ``[B, heads, L, L]`` per layer, ``L = Q + T``; ``cross_attention``: one
    ``[B, heads, Q, N]`` per layer that reads the image.
    """

    query_embeds: Tensor | None
    text_embeds: Tensor | None
    self_attention: tuple[Tensor, ...] = ()
    cross_attention: tuple[Tensor, ...] = ()


class FeedForward(nn.Module):
    """Two linear layers, residual, then LayerNorm (post-norm, as BERT)."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``."""
        normed: Tensor = self.norm(self.down(self.activation(self.up(x))) + x)
        return normed


class QFormerLayer(nn.Module):
    """Self-attention over queries and text, cross-attention of the queries, one feed-forward for each."""

    def __init__(self, config: QFormerConfig, index: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.self_attention = CrossAttention(D, D, config.num_heads)
        self.self_norm = nn.LayerNorm(D, eps=eps)
        self.cross_attention: CrossAttention | None = None
        if config.has_cross_attention(index):
            self.cross_attention = CrossAttention(D, config.encoder_hidden_size, config.num_heads)
            self.cross_norm = nn.LayerNorm(D, eps=eps)
        self.query_feed_forward = FeedForward(config)
        self.text_feed_forward = FeedForward(config) if config.text else None

    def attend(self, hidden: Tensor, mask: Tensor | None, with_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Shared self-attention over ``[B, Q + T, D]``."""
        attended, weights = self.self_attention(hidden, hidden, mask, with_weights=with_weights)
        return self.self_norm(attended + hidden), weights

    def read_image(
        self, queries: Tensor, image_embeds: Tensor, mask: Tensor | None, with_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Cross-attention (if this layer has it) and the queries' feed-forward, ``[B, Q, D]``."""
        weights = None
        if self.cross_attention is not None:
            attended, weights = self.cross_attention(queries, image_embeds, mask, with_weights=with_weights)
            queries = self.cross_norm(attended + queries)
        return self.query_feed_forward(queries), weights


class QFormer(nn.Module):
    """The whole Q-Former, with the learned query tokens and, if the config asks for it, the text branch."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, D).normal_(std=0.02))
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(QFormerLayer(config, i) for i in range(config.num_layers))
        self.word_embeddings: nn.Embedding | None = None
        self.position_embeddings: nn.Embedding | None = None
        if config.text:
            self.word_embeddings = nn.Embedding(config.vocab_size, D, padding_idx=config.pad_token_id)
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, D)

    def forward(
        self,
        image_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        mask: SelfAttentionMask = SelfAttentionMask.BIDIRECTIONAL,
        with_attention: bool = False,
    ) -> QFormerOutput:
        """Run queries on an image, text alone, or both.

        ``image_embeds`` ``[B, N, Dv]``: the encoder's tokens; None runs text alone, without queries.
        ``input_ids`` ``[B, T]`` int64; None runs the queries alone. ``text_attention_mask`` ``[B, T]`` and
        ``image_attention_mask`` ``[B, N]``: 1 or True where there is something, 0 where there is padding.
        ``mask``: who sees whom when there is text. Raises InputError for inputs that do not fit the config.
        """
        self._check(image_embeds, input_ids)
        hidden, num_queries = self._embed(image_embeds, input_ids)
        self_mask = self._self_mask(hidden, num_queries, input_ids, text_attention_mask, mask)
        cross_mask = None
        if image_attention_mask is not None:
            cross_mask = additive_mask(image_attention_mask, hidden.dtype)
        self_maps: list[Tensor | None] = []
        cross_maps: list[Tensor | None] = []
        for layer in self.layers:
            assert isinstance(layer, QFormerLayer)
            hidden, weights = layer.attend(hidden, self_mask, with_attention)
            self_maps.append(weights)
            parts = []
            if image_embeds is not None:
                # Without text there is nothing to cut off, and the traced graph has no Slice and no Concat.
                queries = hidden if input_ids is None else hidden[:, :num_queries]
                queries, weights = layer.read_image(queries, image_embeds, cross_mask, with_attention)
                cross_maps.append(weights)
                parts.append(queries)
            if layer.text_feed_forward is not None and input_ids is not None:
                parts.append(layer.text_feed_forward(hidden[:, num_queries:]))
            hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return QFormerOutput(
            query_embeds=None if image_embeds is None else queries,
            text_embeds=None if input_ids is None else hidden[:, num_queries:],
            self_attention=tuple(m for m in self_maps if m is not None),
            cross_attention=tuple(m for m in cross_maps if m is not None),
        )

    def keep_queries(self, count: int) -> None:
        """From now on, compute the first `count` learned queries alone."""
        self.query_tokens = nn.Parameter(self.query_tokens[:, :count].detach().clone())
        self.config = replace(self.config, num_query_tokens=count)

    def _check(self, image_embeds: Tensor | None, input_ids: Tensor | None) -> None:
        if image_embeds is None and input_ids is None:
            raise InputError("the Q-Former got neither image_embeds nor input_ids; give one or both")
        if image_embeds is not None and image_embeds.shape[-1] != self.config.encoder_hidden_size:
            raise InputError(
                f"image_embeds are {image_embeds.shape[-1]} wide; this Q-Former reads an encoder of width "
                f"{self.config.encoder_hidden_size}"
            )
        if input_ids is not None and not self.config.text:
            raise InputError("this Q-Former has no text branch (config.text is false); leave input_ids out")
        if input_ids is not None and input_ids.shape[1] > self.config.max_position_embeddings:
            raise InputError(
                f"text of {input_ids.shape[1]} tokens is longer than the Q-Former's "
                f"{self.config.max_position_embeddings} positions"
            )

    def _embed(self, image_embeds: Tensor | None, input_ids: Tensor | None) -> tuple[Tensor, int]:
        """Queries, then words with positions, normed: ``[B, Q + T, D]``; and Q, 0 for text alone."""
        parts = []
        if image_embeds is not None:
            parts.append(self.query_tokens.expand(image_embeds.shape[0], -1, -1))
        if input_ids is not None:
            assert self.word_embeddings is not None
            assert self.position_embeddings is not None
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            parts.append(self.word_embeddings(input_ids) + self.position_embeddings(positions))
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self.norm(hidden), 0 if image_embeds is None else self.config.num_query_tokens

    def _self_mask(
        self,
        hidden: Tensor,
        num_queries: int,
        input_ids: Tensor | None,
        text_attention_mask: Tensor | None,
        mask: SelfAttentionMask,
    ) -> Tensor | None:
        """Additive ``[B | 1, 1, 1 | L, L]``, or None when everyone sees everyone."""
        if input_ids is None:
            return None
        if mask is SelfAttentionMask.BIDIRECTIONAL and text_attention_mask is None:
            return None
        keep = mask.keep(num_queries, input_ids.shape[1], hidden.device)[None]
        if text_attention_mask is not None:
            keep = keep & F.pad(text_attention_mask.bool(), (num_queries, 0), value=True)[:, None]
        return additive_mask(keep, hidden.dtype)


def transformers_names(config: QFormerConfig) -> dict[str, str]:
    """Our ``state_dict`` name to transformers', for every weight that a Q-Former of this config has.

    Holds for ``Blip2ForConditionalGeneration`` and, with ``config.text``, ``Blip2ForImageTextRetrieval``.
    """
    modules = {"norm": "qformer.layernorm"}
    if config.text:
        modules |= {name: f"embeddings.{name}" for name in ("word_embeddings", "position_embeddings")}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"qformer.encoder.layer.{i}"
        blocks = {"self": "attention"}
        if config.has_cross_attention(i):
            blocks["cross"] = "crossattention"
        for kind, block in blocks.items():
            for part in ("query", "key", "value"):
                modules[f"{ours}.{kind}_attention.{part}"] = f"{theirs}.{block}.attention.{part}"
            modules[f"{ours}.{kind}_attention.output"] = f"{theirs}.{block}.output.dense"
            modules[f"{ours}.{kind}_norm"] = f"{theirs}.{block}.output.LayerNorm"
        for kind, suffix in ({"query": "_query"} | ({"text": ""} if config.text else {})).items():
            modules[f"{ours}.{kind}_feed_forward.up"] = f"{theirs}.intermediate{suffix}.dense"
            modules[f"{ours}.{kind}_feed_forward.down"] = f"{theirs}.output{suffix}.dense"
            modules[f"{ours}.{kind}_feed_forward.norm"] = f"{theirs}.output{suffix}.LayerNorm"
    embeddings = ("word_embeddings", "position_embeddings")
    names = {"query_tokens": "query_tokens"}
    for ours, theirs in modules.items():
        for part in ("weight",) if ours in embeddings else ("weight", "bias"):
            names[f"{ours}.{part}"] = f"{theirs}.{part}"
    return names
