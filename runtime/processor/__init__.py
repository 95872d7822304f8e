"""Pictures and prompts into tensors, as the manifest's frozen contracts say: Pillow, numpy, tokenizers."""

from __future__ import annotations

from .image import FILTERS, load_image, preprocess_image, preprocess_images
from .text import EncodedPrompt, decode, load_tokenizer, tokenize_prompt

__all__ = [
    "FILTERS",
    "EncodedPrompt",
    "decode",
    "load_image",
    "load_tokenizer",
    "preprocess_image",
    "preprocess_images",
    "tokenize_prompt",
]
