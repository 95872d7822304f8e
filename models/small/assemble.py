"""The trained parts as one Hugging Face ``Blip2ForConditionalGeneration`` directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionModel,
    BlipImageProcessor,
    GenerationConfig,
    LlamaForCausalLM,
)

from ..qformer import QFormer, transformers_names
from .encoder import vision_config
from .language import text_config
from .recipe import Sizes
from .stage2 import Stage2
from .text import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, hugging_face_tokenizer

MAX_NEW_TOKENS = 32


def blip2_config(sizes: Sizes, qformer: QFormer, vocab_size: int) -> Blip2Config:
    """The config of the whole model, as transformers wants it."""
    ours = qformer.config
    theirs = Blip2QFormerConfig(
        vocab_size=vocab_size,
        hidden_size=ours.hidden_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        intermediate_size=ours.intermediate_size,
        hidden_act=ours.activation,
        max_position_embeddings=ours.max_position_embeddings,
        layer_norm_eps=ours.layer_norm_eps,
        pad_token_id=PAD_ID,
        cross_attention_frequency=ours.cross_attention_frequency,
        encoder_hidden_size=ours.encoder_hidden_size,
        use_qformer_text_input=False,
    )
    return Blip2Config(
        vision_config=vision_config(sizes).to_dict(),
        qformer_config=theirs.to_dict(),
        text_config=text_config(sizes, vocab_size).to_dict(),
        num_query_tokens=ours.num_query_tokens,
        image_text_hidden_size=sizes.contrast_width,
        image_token_index=IMAGE_ID,
    )


def processor_of(sizes: Sizes, tokenizer: Tokenizer) -> Any:
    """Squeeze to a square (bicubic), CLIP's normalisation, image tokens before the text."""
    side = {"height": sizes.image, "width": sizes.image}
    untyped: Any = Blip2Processor
    return untyped(
        BlipImageProcessor(size=side, resample=3),
        hugging_face_tokenizer(tokenizer),
        num_query_tokens=sizes.queries,
    )


def assemble(
    sizes: Sizes, vision: Blip2VisionModel, stage2: Stage2, language: LlamaForCausalLM
) -> Blip2ForConditionalGeneration:
    """Put the trained weights into transformers' own model (every weight of it is set, or this raises)."""
    config = blip2_config(sizes, stage2.qformer, language.config.vocab_size)
    model: Any = Blip2ForConditionalGeneration(config)
    weights = {f"vision_model.{k}": v for k, v in vision.state_dict().items()}
    weights |= {f"language_model.{k}": v for k, v in language.state_dict().items()}
    weights |= {f"language_projection.{k}": v for k, v in stage2.projection.state_dict().items()}
    ours = stage2.qformer.state_dict()
    weights |= {theirs: ours[name] for name, theirs in transformers_names(stage2.qformer.config).items()}
    model.load_state_dict(weights, strict=True)
    untyped: Any = GenerationConfig
    generation = untyped(
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
    )
    model.generation_config = generation
    model.language_model.generation_config = generation
    return model.eval()  # type: ignore[no-any-return]


def write_checkpoint(
    out: Path,
    sizes: Sizes,
    tokenizer: Tokenizer,
    vision: Blip2VisionModel,
    stage2: Stage2,
    language: LlamaForCausalLM,
) -> None:
    """Write config, FP32 safetensors, generation config, tokenizer and processor files into ``out``."""
    with torch.no_grad():
        model = assemble(sizes, vision, stage2, language)
    model.save_pretrained(out)
    processor_of(sizes, tokenizer).save_pretrained(out)
