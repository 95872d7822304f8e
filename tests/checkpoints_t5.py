"""Tiny BLIP-2 checkpoints with a T5 language model and random weights, in the files that transformers writes."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, PreTrainedTokenizerFast, T5Config
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from bridgeport.models.contract import KvCacheContract
from bridgeport.models.seq2seq_contract import Seq2SeqContract
from bridgeport.models.stages import Layout
from bridgeport.models.t5 import t5_contracts, t5_ignored, t5_kv_cache, t5_seq2seq, t5_stages, t5_tied
from bridgeport.models.weights import open_weights
from tests.checkpoints import SENTENCES, _blip2_config, _write_processor, randomize

# One entry per configuration that tests run through: gated and plain, own head and tied, heads that are not d_model
# wide together, head sizes that no kernel likes, encoders and decoders of different depth.
T5_CONFIGS: dict[str, dict[str, Any]] = {
    "flan": {"seed": 1},
    "t5-tied": {"seed": 10, "feed_forward_proj": "relu", "tie": True, "num_layers": 3, "num_decoder_layers": 1},
    "odd": {
        "seed": 3,
        "d_model": 40,
        "d_kv": 12,
        "d_ff": 52,
        "num_heads": 3,
        "num_layers": 1,
        "num_decoder_layers": 3,
        "buckets": 6,
        "max_distance": 10,
        "num_query_tokens": 7,
    },
    "one-head": {"seed": 5, "d_model": 24, "d_kv": 5, "num_heads": 1, "tie": True, "buckets": 8, "max_distance": 20},
    "wide": {"seed": 5, "d_model": 32, "d_kv": 24, "num_heads": 4, "feed_forward_proj": "gated-silu", "start": 3},
}


@dataclass(frozen=True, kw_only=True)
class T5Spec:
    """Sizes. `tie`: the head is the embedding, scaled (T5), or its own (Flan-T5). `start`: the decoder's first id."""

    seed: int = 0
    d_model: int = 48
    d_kv: int = 8
    d_ff: int = 72
    num_heads: int = 4
    num_layers: int = 2
    num_decoder_layers: int = 2
    feed_forward_proj: str = "gated-gelu"
    tie: bool = False
    buckets: int = 32
    max_distance: int = 128
    start: int = 0
    extra_vocab: int = 3
    num_query_tokens: int = 4
    image_size: int = 28

    def text_config(self, tokenizer: PreTrainedTokenizerFast) -> T5Config:
        """The language model's config, with the tokenizer's special tokens."""
        make: Any = T5Config  # its special tokens are not declared
        config: T5Config = make(
            vocab_size=len(tokenizer) + self.extra_vocab,
            d_model=self.d_model,
            d_kv=self.d_kv,
            d_ff=self.d_ff,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            num_decoder_layers=self.num_decoder_layers,
            feed_forward_proj=self.feed_forward_proj,
            relative_attention_num_buckets=self.buckets,
            relative_attention_max_distance=self.max_distance,
            tie_word_embeddings=self.tie,
            decoder_start_token_id=self.start,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return config


def write_t5_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """T5's ids of padding (0) and end (1), the end after every text, and an image token that was added last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    make: Any = PreTrainedTokenizerFast  # its constructor is not typed
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )
    fast.save_pretrained(directory)
    return fast


def write_blip2_t5_checkpoint(directory: Path, **options: Any) -> Path:
    """Write a random `Blip2ForConditionalGeneration` with a T5 to `directory` (made if absent) and return it.

    `options` are the fields of `T5Spec`.
    """
    spec = T5Spec(**options)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = write_t5_tokenizer(directory)
    config = _blip2_config(
        spec.text_config(tokenizer),
        vision={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "image_size": spec.image_size,
            "patch_size": 14,
        },
        qformer={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "cross_attention_frequency": 2,
        },
        num_query_tokens=spec.num_query_tokens,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = make_blip2_t5(config, spec)
    model.save_pretrained(directory)
    images = BlipImageProcessorPil(size={"height": spec.image_size, "width": spec.image_size})
    _write_processor(directory, images, tokenizer, spec.num_query_tokens)
    return directory


def make_blip2_t5(config: Any, spec: T5Spec) -> Any:
    """The model with every weight random, and large enough to move the logits."""
    model: Any = Blip2ForConditionalGeneration(config)
    if not spec.tie:
        # transformers 5 ties the head when it makes a model, and unties it when it reads one with a head of its own.
        model.language_model.lm_head.weight = nn.Parameter(torch.zeros_like(model.language_model.lm_head.weight))
    randomize(model, spec.seed)
    randomize_t5(model.language_model, spec.seed)
    return model


def randomize_t5(model: Any, seed: int) -> None:
    """T5 does not scale its scores, and adds a bias for distance: both must be of a size that attention shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("Attention.q.weight", "Attention.k.weight")):
                parameter.mul_(model.config.d_kv**-0.25)
            elif name.endswith("relative_attention_bias.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


@dataclass(frozen=True)
class ExportedT5:
    """The language model of the checkpoint at `path` in two graphs, and its stages in PyTorch."""

    path: Path
    text: Any
    layout: Layout
    stages: dict[str, Any]
    encoder: Path
    decoder: Path

    @property
    def kv_cache(self) -> KvCacheContract:
        """The decoder's own cache."""
        assert self.layout.kv_cache is not None
        return self.layout.kv_cache

    @property
    def seq2seq(self) -> Seq2SeqContract:
        """The rest of what a run time must know."""
        return t5_seq2seq(self.text)


def export_t5(checkpoint: Path, directory: Path, *, precision: str = "fp32") -> ExportedT5:
    """Export both graphs of the checkpoint's T5 to `directory`."""
    from bridgeport.export.llm.seq2seq import export_llm_decoder, export_llm_encoder

    text = Blip2Config.from_pretrained(checkpoint).text_config
    layout = Layout(
        kind="t5",
        stages=t5_stages(text),
        contracts=t5_contracts(text),
        kv_cache=t5_kv_cache(text),
        tied=t5_tied(),
        ignored=t5_ignored(),
    )
    weights = open_weights(checkpoint)
    stages: dict[str, Any] = {name: layout.load(name, weights) for name in layout.stages}
    exported = ExportedT5(checkpoint, text, layout, stages, directory / "encoder.onnx", directory / "decoder.onnx")
    contracts = layout.contracts
    export_llm_encoder(stages["llm_encoder"], contracts["llm_encoder"], exported.encoder, precision=precision)
    export_llm_decoder(
        stages["llm"], contracts["llm"], exported.kv_cache, exported.seq2seq, exported.decoder, precision=precision
    )
    return exported


@functools.cache
def exported_t5(name: str) -> ExportedT5:
    """The FP32 graphs of the configuration that `T5_CONFIGS` has under `name`, made once; do not change them."""
    directory = Path(tempfile.mkdtemp(prefix=f"t5-{name}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return export_t5(write_blip2_t5_checkpoint(directory / "checkpoint", **T5_CONFIGS[name]), directory)
