"""Tiny BLIP-2 checkpoints with random weights, in the files that transformers writes.

The weights are spread so that every part counts: transformers' own initialisation leaves the query tokens at
zero and the vision encoder at 1e-10, and a test on such a model passes whatever the code does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
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


def write_tokenizer(
    directory: Path, *, text: TextModel, image_token: Literal["last", "first"] = "last"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS first; with OPT that is also EOS, as in the real one.

    `image_token`: added after training ("last"), or one of the first tokens of the vocabulary ("first").
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>"] if text == "llama" else ["<s>", "<pad>", "</s>", "<unk>"]
    if image_token == "first":
        specials.append("<image>")
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if image_token == "last":
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


@dataclass(frozen=True, kw_only=True)
class Blip2Spec:
    """A random `Blip2ForConditionalGeneration`: sizes, and how it is stored.

    `tie`: whether the LM head is the embedding; None leaves the text model's own default (Llama no, OPT yes).
    `extra_vocab`: rows of the embedding beyond the tokenizer's ids. `dtype`: how the weights are stored.
    `processor`: whether processor files are written.
    """

    text: TextModel = "llama"
    seed: int = 0
    hidden_size: int = 64
    intermediate_size: int = 96
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_layers: int = 2
    max_position_embeddings: int = 128
    rope_theta: float = 10000.0
    tie: bool | None = None
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    extra_vocab: int = 3
    eos_token_id: int | list[int] | None = None
    image_token: Literal["last", "first"] = "last"
    vision_hidden_size: int = 32
    vision_intermediate_size: int = 48
    vision_heads: int = 2
    vision_layers: int = 2
    qkv_bias: bool = True
    image_size: int = 28
    patch_size: int = 14
    qformer_hidden_size: int = 24
    qformer_intermediate_size: int = 40
    qformer_heads: int = 2
    qformer_layers: int = 3
    cross_attention_frequency: int = 2
    num_query_tokens: int = 4
    resample: int = 3
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    do_normalize: bool = True
    dtype: str = "float32"
    max_shard_size: str | int = "50GB"
    processor: bool = True

    def text_config(self, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig | OPTConfig:
        """The language model's config, with the tokenizer's special tokens."""
        common: dict[str, Any] = {
            "vocab_size": len(tokenizer) + self.extra_vocab,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id if self.eos_token_id is None else self.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if self.tie is not None:
            common["tie_word_embeddings"] = self.tie
        if self.text == "opt":
            return OPTConfig(
                **common,
                ffn_dim=self.intermediate_size,
                word_embed_proj_dim=self.word_embed_proj_dim,
                do_layer_norm_before=self.do_layer_norm_before,
            )
        return LlamaConfig(
            **common,
            intermediate_size=self.intermediate_size,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
        )

    def vision_config(self) -> dict[str, Any]:
        """The vision encoder's config."""
        return {
            "hidden_size": self.vision_hidden_size,
            "intermediate_size": self.vision_intermediate_size,
            "num_attention_heads": self.vision_heads,
            "num_hidden_layers": self.vision_layers,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "qkv_bias": self.qkv_bias,
        }

    def qformer_config(self) -> dict[str, Any]:
        """The Q-Former's config."""
        return {
            "hidden_size": self.qformer_hidden_size,
            "intermediate_size": self.qformer_intermediate_size,
            "num_attention_heads": self.qformer_heads,
            "num_hidden_layers": self.qformer_layers,
            "cross_attention_frequency": self.cross_attention_frequency,
        }


def write_blip2_checkpoint(directory: Path, **options: Any) -> Path:
    """Write a random `Blip2ForConditionalGeneration` to `directory` (made if absent) and return it.

    `options` are the fields of `Blip2Spec`.
    """
    spec = Blip2Spec(**options)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(directory, text=spec.text, image_token=spec.image_token)
    config = _blip2_config(
        spec.text_config(tokenizer),
        vision=spec.vision_config(),
        qformer=spec.qformer_config(),
        num_query_tokens=spec.num_query_tokens,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    _write_weights(Blip2ForConditionalGeneration(config), directory, spec.seed, spec.dtype, spec.max_shard_size)
    if spec.processor:
        images = BlipImageProcessorPil(
            size={"height": spec.image_size, "width": spec.image_size},
            resample=spec.resample,
            image_mean=list(spec.image_mean),
            image_std=list(spec.image_std),
            do_normalize=spec.do_normalize,
        )
        _write_processor(directory, images, tokenizer, spec.num_query_tokens)
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


def copy_of(checkpoint: Path, directory: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(checkpoint, directory, dirs_exist_ok=True)
    return directory


def edit_config(checkpoint: Path, **changes: Any) -> None:
    """Set entries of config.json; a key "text_config.vocab_size" goes one level down."""
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        *outer, last = key.split(".")
        where = config[outer[0]] if outer else config
        where[last] = value
    file.write_text(json.dumps(config))


def edit_weights(checkpoint: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let `edit` change the tensors of the one weight file."""
    file = checkpoint / "model.safetensors"
    state = load_file(file)
    edit(state)
    file.unlink()  # loaded tensors may be mapped from it
    save_file(state, file, metadata={"format": "pt"})


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
