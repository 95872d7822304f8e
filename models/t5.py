"""T5 and Flan-T5 behind a connector (Raffel et al. 2020, arXiv 1910.10683): embed_tokens, llm_encoder and llm.

The layers are transformers' own. Around them: attention that reads what another graph computed, and relative position
biases looked up by distance, which needs no logarithm at run time.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .contract import Axis, KvCacheContract, StageContract, TensorSpec
from .language import batch_axis, float_spec
from .seq2seq_contract import CrossCacheContract, Seq2SeqContract
from .stages import Stage

# T5 has no longest sequence. These bound a call's memory: the encoder's position bias is [heads, prompt, prompt].
MAX_PROMPT_TOKENS = 2048
MAX_NEW_TOKENS = 2048
# Added to the scores of padding: within FP16, and e to the power of it is 0.
MASKED = -1e4


class T5LanguageEncoder(nn.Module):
    """The encoder, and the projections that make of its output what the decoder's cross-attention reads.

    `cross[i]["k"]` and `["v"]` are those of decoder layer `i`. `buckets`: the bias' row for each distance from
    `-max_distance` to `max_distance`, made by `finish`.
    """

    buckets: Tensor

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.encoder = _stack(text, decoder=False)
        width = text.num_heads * text.d_kv
        self.cross = nn.ModuleList(
            nn.ModuleDict({kind: nn.Linear(text.d_model, width, bias=False) for kind in ("k", "v")})
            for _ in range(text.num_decoder_layers)
        )
        self.num_heads: int = text.num_heads
        self.register_buffer("buckets", torch.zeros(2 * text.relative_attention_max_distance + 1), persistent=False)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """`inputs_embeds` `[B, S, D]`, rows padded on the right, and `attention_mask` `[B, S]` (1: a token).

        Returns key and value of each decoder layer in turn, `[B, heads, S, head_size]`; what stands at padding is
        void.
        """
        hidden = inputs_embeds
        bias = self.position_bias(hidden.shape[1]) + padding_bias(attention_mask)
        for block in _blocks(self.encoder):
            layer, feed_forward = block.layer
            hidden = hidden + self._attend(layer.SelfAttention, rms_norm(layer.layer_norm, hidden), bias)
            hidden = hidden + run_feed_forward(feed_forward, hidden)
        hidden = rms_norm(self.encoder.final_layer_norm, hidden)
        return tuple(
            split_heads(projection(hidden), self.num_heads)
            for pair in self.cross
            for projection in (pair["k"], pair["v"])  # type: ignore[index]  # a ModuleDict to ModuleList
        )

    def position_bias(self, length: int) -> Tensor:
        """`[1, heads, S, S]`: what each head adds for the distance from query to key."""
        positions = torch.arange(length)
        reach = (self.buckets.shape[0] - 1) // 2
        distance = torch.clamp(positions[None] - positions[:, None], -reach, reach)
        return F.embedding(distance + reach, _bias_by_distance(self.encoder, self.buckets)).permute(2, 0, 1)[None]

    def _attend(self, attention: Any, hidden: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (
            split_heads(project(hidden), self.num_heads) for project in (attention.q, attention.k, attention.v)
        )
        output: Tensor = attention.o(attend(query, key, value, bias))
        return output


class T5LanguageDecoder(nn.Module):
    """The decoder and its head, without what `T5LanguageEncoder` computes: keys and values of the prompt.

    `buckets`: the bias' row for each distance back, from 0 to `max_distance`, made by `finish`. It has no `forward`:
    its caches are the run time's (see export/llm/seq2seq_graph.py).
    """

    buckets: Tensor

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.decoder = _stack(text, decoder=True)
        for block in _blocks(self.decoder):
            del block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v
        self.lm_head = nn.Linear(text.d_model, text.vocab_size, bias=False)
        self.register_buffer("buckets", torch.zeros(text.relative_attention_max_distance + 1), persistent=False)

    def position_bias(self, distance: Tensor) -> Tensor:
        """`distance` `[B, S, T]`, how far each key lies before its query, to `[B, heads, S, T]`."""
        reach = self.buckets.shape[0] - 1
        biases = _bias_by_distance(self.decoder, self.buckets)
        return F.embedding(torch.clamp(distance, 0, reach), biases).permute(0, 3, 1, 2)


def t5_stages(text: Any, prefix: str = "language_model.") -> dict[str, Stage]:
    """The stages of the T5 text config `text`, whose weights the checkpoint keeps under `prefix`."""

    def encoder_name(name: str) -> str:
        if not name.startswith("cross."):
            return prefix + name
        _, layer, rest = name.split(".", 2)
        return f"{prefix}decoder.block.{layer}.layer.1.EncDecAttention.{rest}"

    return {
        "embed_tokens": Stage(
            lambda: nn.Embedding(text.vocab_size, text.d_model), lambda name: f"{prefix}shared.{name}"
        ),
        "llm_encoder": Stage(lambda: T5LanguageEncoder(text), encoder_name, finish=_make_buckets),
        "llm": Stage(lambda: T5LanguageDecoder(text), lambda name: prefix + name, finish=_make_buckets),
    }


def t5_contracts(text: Any) -> dict[str, StageContract]:
    """The contracts of the stages; the cross cache stands in them, the decoder's own cache does not."""
    width, prompt = text.d_model, _length("sequence", MAX_PROMPT_TOKENS)
    embedding = StageContract(
        name="embed_tokens",
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),),
        outputs=(float_spec("inputs_embeds", "batch", "sequence", width),),
        axes=(batch_axis(), prompt),
    )
    encoder = StageContract(
        name="llm_encoder",
        inputs=(
            float_spec("inputs_embeds", "batch", "sequence", width),
            TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "sequence")),
        ),
        outputs=_cross_specs(text, "sequence"),
        axes=(batch_axis(), prompt),
    )
    decoder = StageContract(
        name="llm",
        inputs=(
            float_spec("inputs_embeds", "batch", "sequence", width),
            TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "total_sequence")),
            TensorSpec(name="logits_position", dtype="int64", shape=("batch",)),
            TensorSpec(name="encoder_attention_mask", dtype="int64", shape=("batch", "encoder_sequence")),
            *_cross_specs(text, "encoder_sequence"),
        ),
        outputs=(float_spec("logits", "batch", text.vocab_size),),
        axes=(
            batch_axis(),
            _length("sequence", MAX_NEW_TOKENS),
            _length("total_sequence", MAX_NEW_TOKENS),
            _length("encoder_sequence", MAX_PROMPT_TOKENS),
        ),
    )
    return {"embed_tokens": embedding, "llm_encoder": encoder, "llm": decoder}


def t5_kv_cache(text: Any) -> KvCacheContract:
    """The decoder's own cache; GroupQueryAttention takes head sizes in eights, so others are padded with zeros."""
    return KvCacheContract(
        num_layers=text.num_decoder_layers,
        num_heads=text.num_heads,
        head_size=-(-text.d_kv // 8) * 8,
        dtype="float32",
        shared_buffer=True,
    )


def t5_seq2seq(text: Any) -> Seq2SeqContract:
    """Raises CheckpointError when nothing says which token starts the decoder, as transformers' `generate` does."""
    # T5Config declares neither of the two.
    starts = (getattr(text, name, None) for name in ("decoder_start_token_id", "bos_token_id"))
    start = next((token for token in starts if token is not None), None)
    if not isinstance(start, int) or not 0 <= start < text.vocab_size:
        raise CheckpointError(
            f"config.json: text_config.decoder_start_token_id is {start}, accepted is a token of the vocabulary of "
            f"{text.vocab_size}; T5 starts with its pad_token_id, {text.pad_token_id}"
        )
    return Seq2SeqContract(
        decoder_start_token_id=start,
        cross_cache=_cross_cache(text),
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def t5_tied(prefix: str = "language_model.") -> dict[str, str]:
    """For `Layout.tied`: T5's head is the embedding, Flan-T5's is its own; what is stored decides."""
    return {f"{prefix}lm_head.weight": f"{prefix}shared.weight"}


def t5_ignored(prefix: str = "language_model.") -> frozenset[str]:
    """Copies of the embedding, and a bias that cross-attention never had a use for, in files of older releases."""
    names = (
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    )
    return frozenset(prefix + name for name in names)


def reference_t5(encoder: T5LanguageEncoder, decoder: T5LanguageDecoder, text: Any) -> Any:
    """transformers' T5ForConditionalGeneration over the very modules of the two stages, no weight copied.

    It takes embeddings only, `inputs_embeds` and `decoder_inputs_embeds`. `decoder` gets what it left to `encoder`.
    """
    from transformers import T5ForConditionalGeneration

    with torch.device("meta"):
        model: Any = T5ForConditionalGeneration(text)
    model.encoder, model.decoder, model.lm_head = encoder.encoder, decoder.decoder, decoder.lm_head
    for block, pair in zip(_blocks(decoder.decoder), encoder.cross, strict=True):
        block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v = pair["k"], pair["v"]  # type: ignore[index]
    return model.eval()


def rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    """T5LayerNorm, with a division, which ONNX Runtime knows as one operator."""
    variance = hidden.pow(2).mean(-1, keepdim=True)
    normed: Tensor = norm.weight * (hidden / torch.sqrt(variance + norm.variance_epsilon))
    return normed


def run_feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    """A `T5LayerFF` without its residual: gated (Flan-T5) or not (T5)."""
    dense, hidden = layer.DenseReluDense, rms_norm(layer.layer_norm, hidden)
    inner = _activate(dense.act, (dense.wi_0 if hasattr(dense, "wi_0") else dense.wi)(hidden))
    if hasattr(dense, "wi_1"):
        inner = inner * dense.wi_1(hidden)
    output: Tensor = dense.wo(inner)
    return output


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """`softmax(Q K^T + bias) V` of `[B, heads, S, head_size]`, heads side by side again: `[B, S, heads * head_size]`.

    T5 does not scale the scores.
    """
    weights = torch.softmax(query @ key.transpose(2, 3) + bias, dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """`[B, S, heads * size]` to `[B, heads, S, size]`."""
    batch, length, width = states.shape
    return states.view(batch, length, num_heads, width // num_heads).transpose(1, 2)


def padding_bias(attention_mask: Tensor) -> Tensor:
    """`[B, S]` of 1 and 0 to `[B, 1, 1, S]` of 0 and `MASKED`."""
    return ((1.0 - attention_mask.float()) * MASKED)[:, None, None]


def _stack(text: Any, *, decoder: bool) -> Any:
    from transformers.models.t5.modeling_t5 import T5Stack

    config = copy.deepcopy(text)
    config.is_decoder = decoder
    config.use_cache = decoder
    config._attn_implementation = "eager"
    if decoder:
        config.num_layers = text.num_decoder_layers
    stack: Any = T5Stack(config)
    del stack.embed_tokens  # the stage embed_tokens
    return stack


def _blocks(stack: Any) -> Any:
    return stack.block


def _bias_by_distance(stack: Any, buckets: Tensor) -> Tensor:
    """Rows of the bias table, which the first layer holds for all layers: `[distances, heads]`."""
    weight: Tensor = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    return F.embedding(buckets, weight)


def _activate(activation: Any, hidden: Tensor) -> Tensor:
    from transformers.activations import NewGELUActivation

    if isinstance(activation, NewGELUActivation):  # one operator instead of eight
        return F.gelu(hidden, approximate="tanh")
    output: Tensor = activation(hidden)
    return output


def _make_buckets(module: nn.Module) -> None:
    """transformers' own function for every distance: its logarithm lies on edges that rounding decides."""
    stack: Any = module.decoder if isinstance(module, T5LanguageDecoder) else module.encoder
    attention = stack.block[0].layer[0].SelfAttention
    reach = attention.relative_attention_max_distance
    distances = -torch.arange(reach + 1) if attention.is_decoder else torch.arange(-reach, reach + 1)
    module.register_buffer(
        "buckets",
        attention._relative_position_bucket(
            distances,
            bidirectional=not attention.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=reach,
        ),
        persistent=False,
    )


def _cross_cache(text: Any) -> CrossCacheContract:
    return CrossCacheContract(
        num_layers=text.num_decoder_layers, num_heads=text.num_heads, head_size=text.d_kv, dtype="float32"
    )


def _cross_specs(text: Any, length: str) -> tuple[TensorSpec, ...]:
    shape = ("batch", text.num_heads, length, text.d_kv)
    return tuple(float_spec(name, *shape) for name in _cross_cache(text).names())


def _length(name: str, most: int) -> Axis:
    return Axis(name=name, min=1, opt=64, max=most)
