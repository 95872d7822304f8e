"""Pictures and prompts into tensors, as the manifest's frozen contracts say: Pillow, numpy, tokenizers."""

from __future__ import annotations

from .image import FILTERS, load_image, preprocess_image, preprocess_images
from .picture import PictureTensors, load_picture, prepare_picture
from .text import EncodedPrompt, decode, load_tokenizer, tokenize_prompt

__all__ = [
    "FILTERS",
    "EncodedPrompt",
    "PictureTensors",
    "decode",
    "load_image",
    "load_picture",
    "load_tokenizer",
    "prepare_picture",
    "preprocess_image",
    "preprocess_images",
    "tokenize_prompt",
]
