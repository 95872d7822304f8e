"""Tiny BLIP-2 checkpoints with random weights, in the files that transformers writes.

The weights are spread so that every part counts: transformers' own initialisation leaves the query tokens at
zero and the vision encoder at 1e-10, and a test on such a model passes whatever the code does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.blip_2.processing_blip_2 import Blip2Processor

TextModel = Literal["llama", "opt"]

SENTENCES = (
    "a photo of a red circle on the left and a blue square on the right",
    "Question: how many shapes are there? Answer: two",
    "Question: what colour is the triangle? Answer: green",
    "there is one yellow star above a purple hexagon.",
)

# What a text model needs beside the common sizes, one entry per configuration that tests run through.
TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"text": "llama", "seed": 1},
    "llama-gqa-tied": {"text": "llama", "seed": 2, "num_kv_heads": 2, "tie": True},
    "llama-mqa-wide": {
        "text": "llama",
        "seed": 3,
        "num_kv_heads": 1,
        "head_dim": 24,
        "num_query_tokens": 7,
        "rope_theta": 500.0,
    },
    "opt": {"text": "opt", "seed": 4},
    "opt-untied": {
        "text": "opt",
        "seed": 5,
        "tie": False,
        "num_heads": 2,
        "num_layers": 3,
        "num_query_tokens": 1,
    },
}


def write_tokenizer(directory: Path, *, text: TextModel, image_token: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS first; with OPT that is also EOS, as in the real one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>"] if text == "llama" else ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if image_token:
        tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    bos = "<s>" if text == "llama" else "</s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    make: Any = PreTrainedTokenizerFast  # its constructor is not typed
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=1_000_000,
    )
    fast.save_pretrained(directory)
    return fast


def randomize(model: nn.Module, seed: int) -> None:
    """Give every parameter a random value of a sensible size: all parts of the model then move the logits."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(module.weight) for module in model.modules() if "Norm" in type(module).__name__}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in norms:
                value = 1.0 + 0.2 * noise
            elif name.endswith("query_tokens"):
                value = noise
            elif id(parameter) in embeddings or "embedding" in name.rsplit(".", 1)[-1]:
                value = 0.5 * noise
            elif parameter.dim() == 1:
                value = 0.1 * noise
            else:
                fan_in = parameter[0].numel()
                value = 1.5 * noise / fan_in**0.5
            parameter.copy_(value)


def write_blip2_checkpoint(
    directory: Path,
    *,
    text: TextModel = "llama",
    seed: int = 0,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    num_layers: int = 2,
    max_position_embeddings: int = 128,
    rope_theta: float = 10000.0,
    tie: bool | None = None,
    word_embed_proj_dim: int | None = None,
    do_layer_norm_before: bool = True,
    extra_vocab: int = 3,
    vision_hidden_size: int = 32,
    vision_intermediate_size: int = 48,
    vision_heads: int = 2,
    vision_layers: int = 2,
    qkv_bias: bool = True,
    image_size: int = 28,
    patch_size: int = 14,
    qformer_hidden_size: int = 24,
    qformer_intermediate_size: int = 40,
    qformer_heads: int = 2,
    qformer_layers: int = 3,
    cross_attention_frequency: int = 2,
    num_query_tokens: int = 4,
    resample: int = 3,
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073),
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711),
    do_normalize: bool = True,
    eos_token_id: int | list[int] | None = None,
    dtype: str = "float32",
    max_shard_size: str | int = "50GB",
    processor: bool = True,
) -> Path:
    """Write a random `Blip2ForConditionalGeneration` to `directory` (made if absent) and return it.

    `tie`: whether the LM head is the embedding; None leaves the text model's own default (Llama no, OPT yes).
    `extra_vocab`: rows of the embedding beyond the tokenizer's ids. `dtype`: how the weights are stored.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(directory, text=text)
    text_config = _text_config(
        text,
        vocab_size=len(tokenizer) + extra_vocab,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if eos_token_id is None else eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        llama={
            "intermediate_size": intermediate_size,
            "num_key_value_heads": num_kv_heads,
            "head_dim": head_dim,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        },
        opt={
            "ffn_dim": intermediate_size,
            "word_embed_proj_dim": word_embed_proj_dim,
            "do_layer_norm_before": do_layer_norm_before,
        },
        tie=tie,
    )
    config = _blip2_config(
        text_config,
        vision={
            "hidden_size": vision_hidden_size,
            "intermediate_size": vision_intermediate_size,
            "num_attention_heads": vision_heads,
            "num_hidden_layers": vision_layers,
            "image_size": image_size,
            "patch_size": patch_size,
            "qkv_bias": qkv_bias,
        },
        qformer={
            "hidden_size": qformer_hidden_size,
            "intermediate_size": qformer_intermediate_size,
            "num_attention_heads": qformer_heads,
            "num_hidden_layers": qformer_layers,
            "cross_attention_frequency": cross_attention_frequency,
        },
        num_query_tokens=num_query_tokens,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    _write_weights(Blip2ForConditionalGeneration(config), directory, seed, dtype, max_shard_size)
    if processor:
        images = BlipImageProcessorPil(
            size={"height": image_size, "width": image_size},
            resample=resample,
            image_mean=list(image_mean),
            image_std=list(image_std),
            do_normalize=do_normalize,
        )
        _write_processor(directory, images, tokenizer, num_query_tokens)
    return directory


def write_retrieval_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    vision_hidden_size: int = 32,
    vision_layers: int = 2,
    image_size: int = 28,
    patch_size: int = 14,
    qformer_hidden_size: int = 24,
    qformer_layers: int = 3,
    cross_attention_frequency: int = 2,
    num_query_tokens: int = 4,
    image_text_hidden_size: int = 16,
    max_position_embeddings: int = 40,
    image_token: bool = False,
) -> Path:
    """Write a random `Blip2ForImageTextRetrieval` (text Q-Former, projections, matching head) to `directory`.

    With `image_token` the prompt carries placeholders that the model cuts off (`image_token_index` is set).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(directory, text="llama")
    config = _blip2_config(
        # The retrieval model has no language model; its config still names one.
        OPTConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8),
        vision={
            "hidden_size": vision_hidden_size,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_hidden_layers": vision_layers,
            "image_size": image_size,
            "patch_size": patch_size,
        },
        qformer={
            "hidden_size": qformer_hidden_size,
            "intermediate_size": 40,
            "num_attention_heads": 2,
            "num_hidden_layers": qformer_layers,
            "cross_attention_frequency": cross_attention_frequency,
            "use_qformer_text_input": True,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": max_position_embeddings,
        },
        num_query_tokens=num_query_tokens,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>") if image_token else None,
        image_text_hidden_size=image_text_hidden_size,
    )
    _write_weights(Blip2ForImageTextRetrieval(config), directory, seed, "float32", "50GB")
    images = BlipImageProcessorPil(size={"height": image_size, "width": image_size})
    _write_processor(directory, images, tokenizer, num_query_tokens if image_token else None)
    return directory


def _text_config(
    text: TextModel, *, llama: dict[str, Any], opt: dict[str, Any], tie: bool | None, **common: Any
) -> Any:
    own: dict[str, Any] = {} if tie is None else {"tie_word_embeddings": tie}
    if text == "llama":
        return LlamaConfig(**common, **own, **llama)
    return OPTConfig(**common, **own, **opt)


def _blip2_config(text_config: Any, *, vision: dict[str, Any], qformer: dict[str, Any], **rest: Any) -> Any:
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer | {"encoder_hidden_size": vision["hidden_size"]},
        text_config=text_config.to_dict(),
        **rest,
    )


def _write_weights(model: Any, directory: Path, seed: int, dtype: str, max_shard_size: str | int) -> None:
    randomize(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)


def _write_processor(directory: Path, images: Any, tokenizer: Any, num_query_tokens: int | None) -> None:
    made = Blip2Processor(images, tokenizer, num_query_tokens=num_query_tokens)  # type: ignore[no-untyped-call]
    made.save_pretrained(directory)
