"""The language model behind a connector: its two stages, their contracts and its cache, for every causal decoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import CheckpointError, UnsupportedError
from .contract import Axis, KvCacheContract, StageContract, TensorSpec
from .stages import Stage

MAX_BATCH = 64
# What `export.llm` has a builder for; T5 and Idefics bring stages of their own.
TEXT_MODELS = (
    "llama", "mistral", "qwen2", "gemma", "phi", "phi3", "opt", "qwen2_vl_text", "qwen2_5_vl_text",
)  # fmt: skip


def language_stages(text: Any, *, model: str, lm_head: str) -> dict[str, Stage]:
    """The stages embed_tokens and llm of the text config `text`.

    `model`, `lm_head`: where the checkpoint keeps the decoder and its head, say "model.language_model." and
    "lm_head.".
    """

    if text.model_type not in TEXT_MODELS:
        raise UnsupportedError(
            f"config.json: text_config is of model_type {text.model_type!r}; supported are {', '.join(TEXT_MODELS)}"
        )

    def stored(name: str) -> str:
        for ours, theirs in (("model.", model), ("lm_head.", lm_head)):
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        raise KeyError(name)

    embedding = stored(embedding_name(text))
    return {
        "embed_tokens": Stage(lambda: nn.Embedding(text.vocab_size, text.hidden_size), lambda name: embedding),
        "llm": Stage(lambda: make_language_model(text), stored, finish=finish_language_model),
    }


def language_contracts(text: Any) -> dict[str, StageContract]:
    """The contracts of both stages."""
    return {"embed_tokens": embed_tokens_contract(text), "llm": llm_contract(text)}


def tied_head(text: Any, *, model: str, lm_head: str) -> dict[str, str]:
    """For `Layout.tied`: the LM head and the embedding that stands in for it, if they are one weight."""
    tied = bool(getattr(text, "tie_word_embeddings", False))
    return {f"{lm_head}weight": f"{model}{embedding_name(text).removeprefix('model.')}"} if tied else {}


def embedding_name(text: Any) -> str:
    """Name of the token embedding's weight in transformers' causal language model."""
    return "model.decoder.embed_tokens.weight" if text.model_type == "opt" else "model.embed_tokens.weight"


def check_image_token(config: Any, text: Any, key: str = "image_token_id") -> None:
    """Raise CheckpointError unless `config` names a token of the vocabulary that stands for pictures."""
    token = getattr(config, key, None)
    if token is None:
        raise CheckpointError(
            f"config.json has no {key}, so nothing says which token stands for the picture; "
            "save the checkpoint again with transformers 4.46 or newer"
        )
    if not isinstance(token, int) or not 0 <= token < text.vocab_size:
        raise CheckpointError(
            f"config.json: {key} {token} is outside the text model's vocabulary of {text.vocab_size}; give the id of "
            "the image token"
        )


def make_language_model(text_config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM  # `from_config` is not typed
    model: nn.Module = make.from_config(text_config, attn_implementation="sdpa")
    return model


def finish_language_model(module: nn.Module) -> None:
    """Make what is computed and not stored, and make tied weights one parameter again."""
    from transformers import PreTrainedModel

    config: Any = getattr(module, "config", None)
    for parent in list(module.modules()):
        rotary = getattr(parent, "rotary_emb", None)
        if isinstance(rotary, nn.Module):
            # Its frequencies were built on the meta device, which computes nothing.
            make: Any = type(rotary)
            parent.rotary_emb = make(config=config)
    if isinstance(module, PreTrainedModel):
        module.tie_weights()


def batch_axis() -> Axis:
    """Rows (or pictures, or tiles) of one call."""
    return Axis(name="batch", min=1, opt=1, max=MAX_BATCH)


def embed_tokens_contract(text: Any) -> StageContract:
    """`input_ids` `[B, S]` to `inputs_embeds` `[B, S, D]`."""
    return StageContract(
        name="embed_tokens",
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),),
        outputs=(float_spec("inputs_embeds", "batch", "sequence", text.hidden_size),),
        axes=(batch_axis(), length_axis("sequence", text)),
    )


def llm_contract(text: Any) -> StageContract:
    """`inputs_embeds` `[B, S, D]`, the mask over all tokens so far, each row's last position, to `logits` `[B, V]`."""
    return StageContract(
        name="llm",
        inputs=(
            float_spec("inputs_embeds", "batch", "sequence", text.hidden_size),
            TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "total_sequence")),
            TensorSpec(name="logits_position", dtype="int64", shape=("batch",)),
        ),
        outputs=(float_spec("logits", "batch", text.vocab_size),),
        axes=(batch_axis(), length_axis("sequence", text), length_axis("total_sequence", text)),
    )


def kv_cache(text: Any) -> KvCacheContract:
    """The cache of a decoder with the text config `text`."""
    heads = text.num_attention_heads
    return KvCacheContract(
        num_layers=text.num_hidden_layers,
        num_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        dtype="float32",
        shared_buffer=True,
    )


def length_axis(name: str, text: Any) -> Axis:
    """An axis that counts tokens, up to the context."""
    context = text.max_position_embeddings
    return Axis(name=name, min=1, opt=min(64, context), max=context)


def float_spec(name: str, *shape: int | str) -> TensorSpec:
    """A float32 tensor."""
    return TensorSpec(name=name, dtype="float32", shape=shape)
