"""Tiny CLIP, SigLIP and BLIP-2 retrieval checkpoints with random weights, in the files that transformers writes."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.processing_clip import CLIPProcessor
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip.processing_siglip import SiglipProcessor
from transformers.models.siglip.tokenization_siglip import SiglipTokenizer

from tests.checkpoints import SENTENCES, randomize, write_retrieval_checkpoint

# One entry per configuration that tests run through; those behind "odd" have nothing square or of one size.
CLIP_CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {"seed": 1, "vision_layers": 1, "text_layers": 1},
    # Patches that do not fill the picture, towers of different widths, a projection wider than both.
    "clip-odd": {
        "seed": 2,
        "image_size": 45,
        "patch_size": 14,
        "vision_hidden_size": 24,
        "vision_heads": 3,
        "text_hidden_size": 40,
        "text_heads": 5,
        "text_layers": 3,
        "projection_dim": 50,
        "max_length": 19,
        "hidden_act": "gelu",
        "dtype": "float16",
    },
    # The end token as configs of before transformers 4.32 have it, whatever the tokenizer's is.
    "clip-legacy-eos": {"seed": 3, "legacy_eos": True, "patch_size": 28, "projection_dim": 7},
}
SIGLIP_CONFIGS: dict[str, dict[str, Any]] = {
    "siglip": {"seed": 1, "vision_layers": 1, "text_layers": 1},
    "siglip-odd": {
        "seed": 2,
        "image_size": 50,
        "patch_size": 16,
        "hidden_size": 36,
        "vision_heads": 3,
        "text_hidden_size": 20,
        "text_heads": 5,
        "vision_layers": 3,
        "max_length": 11,
        "dtype": "bfloat16",
    },
    # As SigLIP 2's: another kind of tokenizer; and the model gets its mask.
    "siglip-fast": {"seed": 3, "tokenizer": "fast", "patch_size": 7, "text_layers": 1},
}
RETRIEVAL_CONFIGS: dict[str, dict[str, Any]] = {
    "retrieval": {"seed": 3, "vision_layers": 1, "qformer_layers": 2},
    # Its processor puts placeholders before a text, which the model cuts off.
    "retrieval-placeholders": {"seed": 4, "image_token": True},
    "retrieval-odd": {
        "seed": 5,
        "image_size": 45,
        "patch_size": 14,
        "vision_layers": 1,
        "qformer_layers": 4,
        "cross_attention_frequency": 3,
        "num_query_tokens": 7,
        "image_text_hidden_size": 9,
        "max_position_embeddings": 17,
    },
}
SCORE_CONFIGS = RETRIEVAL_CONFIGS | CLIP_CONFIGS | SIGLIP_CONFIGS


def write_score_checkpoint(directory: Path, name: str) -> Path:
    """Write the checkpoint that `SCORE_CONFIGS` has under `name`."""
    options = SCORE_CONFIGS[name]
    if name in RETRIEVAL_CONFIGS:
        return write_retrieval_checkpoint(directory, **options)
    return (write_clip_checkpoint if name in CLIP_CONFIGS else write_siglip_checkpoint)(directory, **options)


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """A random `CLIPModel`. `shortest_edge`: of the picture before the crop, None for a plain resize."""

    seed: int = 0
    image_size: int = 28
    patch_size: int = 14
    vision_hidden_size: int = 32
    vision_heads: int = 2
    vision_layers: int = 2
    text_hidden_size: int = 32
    text_heads: int = 2
    text_layers: int = 2
    projection_dim: int = 16
    max_length: int = 24
    hidden_act: str = "quick_gelu"
    legacy_eos: bool = False
    shortest_edge: int | None = 30
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class SiglipSpec:
    """A random `SiglipModel`; `tokenizer`: sentencepiece as SigLIP's own, or a fast one whose mask the model gets."""

    seed: int = 0
    image_size: int = 28
    patch_size: int = 14
    hidden_size: int = 32
    vision_heads: int = 2
    vision_layers: int = 2
    text_hidden_size: int = 32
    text_heads: int = 2
    text_layers: int = 2
    max_length: int = 16
    tokenizer: Literal["sentencepiece", "fast"] = "sentencepiece"
    dtype: str = "float32"


def write_clip_checkpoint(directory: Path, **options: Any) -> Path:
    """Write a random `CLIPModel` to `directory` (made if absent) and return it; `options`: fields of `ClipSpec`."""
    spec = ClipSpec(**options)
    tokenizer = _clip_tokenizer(spec.max_length)
    config = CLIPConfig(
        vision_config=_vision(spec, spec.vision_hidden_size) | {"hidden_act": spec.hidden_act},
        text_config=_text(spec)
        | {
            "vocab_size": len(tokenizer),
            "hidden_act": spec.hidden_act,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": 2 if spec.legacy_eos else tokenizer.eos_token_id,
            "pad_token_id": 1,
        },
        projection_dim=spec.projection_dim,
    )
    model = CLIPModel(config)
    _randomize(model, spec.seed)
    with torch.no_grad():
        model.visual_projection.weight.normal_(generator=torch.Generator().manual_seed(spec.seed + 20))
        model.text_projection.weight.normal_(generator=torch.Generator().manual_seed(spec.seed + 21))
        model.logit_scale.fill_(2.0 + 0.1 * spec.seed)
    size: dict[str, Any] = {"size": {"height": spec.image_size, "width": spec.image_size}, "do_center_crop": False}
    if spec.shortest_edge is not None:
        edge = max(spec.shortest_edge, spec.image_size)
        size = {"size": {"shortest_edge": edge}, "crop_size": {"height": spec.image_size, "width": spec.image_size}}
    _save(model, spec.dtype, directory)
    _save_processor(CLIPProcessor, CLIPImageProcessorPil(**size), tokenizer, directory)
    return Path(directory)


def write_siglip_checkpoint(directory: Path, **options: Any) -> Path:
    """Write a random `SiglipModel` to `directory` (made if absent) and return it; `options`: `SiglipSpec`'s fields."""
    spec = SiglipSpec(**options)
    Path(directory).mkdir(parents=True, exist_ok=True)
    tokenizer: Any = (
        _siglip_tokenizer(directory, spec.max_length) if spec.tokenizer == "sentencepiece" else _fast_tokenizer()
    )
    config = SiglipConfig(
        vision_config=_vision(spec, spec.hidden_size),
        text_config=_text(spec)
        | {
            "vocab_size": len(tokenizer),
            "projection_size": spec.hidden_size,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    model = SiglipModel(config)
    _randomize(model, spec.seed)
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-0.7)
    _save(model, spec.dtype, directory)
    size = {"height": spec.image_size, "width": spec.image_size}
    _save_processor(SiglipProcessor, SiglipImageProcessorPil(size=size), tokenizer, directory)
    return Path(directory)


def _vision(spec: Any, hidden_size: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 48,
        "num_attention_heads": spec.vision_heads,
        "num_hidden_layers": spec.vision_layers,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
    }


def _text(spec: Any) -> dict[str, Any]:
    return {
        "hidden_size": spec.text_hidden_size,
        "intermediate_size": 56,
        "num_attention_heads": spec.text_heads,
        "num_hidden_layers": spec.text_layers,
        "max_position_embeddings": spec.max_length,
    }


def _randomize(model: Any, seed: int) -> None:
    randomize(model.vision_model, seed)
    randomize(model.text_model, seed + 10)


def _save(model: Any, dtype: str, directory: Path) -> None:
    model.to(getattr(torch, dtype)).save_pretrained(directory)


def _save_processor(make: Any, images: Any, tokenizer: Any, directory: Path) -> None:
    make(images, tokenizer).save_pretrained(directory)


def _clip_tokenizer(max_length: int) -> CLIPTokenizer:
    """CLIP's own pipeline (lower case, `</w>` at the end of words) around a vocabulary of some sentences."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    trained.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=620, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(SENTENCES, trainer)
    model = _json(trained)["model"]
    vocab = dict(model["vocab"])
    for letter in sorted(alphabet):  # every byte can end a word
        vocab.setdefault(f"{letter}</w>", len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    make: Any = CLIPTokenizer
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer: CLIPTokenizer = make(vocab=vocab, merges=merges, model_max_length=max_length)
    return tokenizer


def _siglip_tokenizer(directory: Path, max_length: int) -> SiglipTokenizer:
    """A sentencepiece model with the special tokens of SigLIP's, where the end token pads."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence.lower() for sentence in SENTENCES * 3]),
        model_writer=file,
        vocab_size=64,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = Path(directory) / "spiece.model"
    path.write_bytes(file.getvalue())
    make: Any = SiglipTokenizer
    tokenizer: SiglipTokenizer = make(
        vocab_file=str(path), model_max_length=max_length, model_input_names=["input_ids"]
    )
    return tokenizer


def _fast_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words and an end token; no limit of its own, so that the model's positions are the limit."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    make: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    return fast


def _json(tokenizer: Tokenizer) -> Any:
    return json.loads(tokenizer.to_str())
