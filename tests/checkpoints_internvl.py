"""Small random checkpoints of InternVL, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.checkpoints import randomize, write_tokenizer
from tests.checkpoints_idefics2 import SMALL_TEXT
from tests.checkpoints_idefics3 import write_processor

SMALL_VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": [28, 28],
    "patch_size": [7, 7],
}
MARKS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<image>",
    "video_token": "<video>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_internvl_checkpoint(
    directory: Path,
    *,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    downsample_ratio: float = 0.5,
    layer: int = -1,
    tie: bool = False,
    max_tiles: int = 4,
    seed: int = 0,
) -> Path:
    """`InternVLForConditionalGeneration` with a Qwen2 decoder (`text` may name another); returns `directory`."""
    import transformers as t
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    write_tokenizer(directory, text="llama")
    load: Any = t.PreTrainedTokenizerFast
    tokenizer = load.from_pretrained(directory, extra_special_tokens=MARKS)
    vision = {**SMALL_VISION, **(vision or {})}
    height, width = vision["image_size"]
    images: Any = GotOcr2ImageProcessorPil(
        size={"height": height, "width": width}, crop_to_patches=True, min_patches=1, max_patches=max_tiles
    )
    tokens = int((height // vision["patch_size"][0] * downsample_ratio) ** 2)
    write_processor(directory, "InternVLProcessor", images, tokenizer, CHAT_TEMPLATE, image_seq_length=tokens)
    text = {"model_type": "qwen2", **SMALL_TEXT, **(text or {}), "vocab_size": len(tokenizer) + 3}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config: Any = t.InternVLConfig(
        vision_config=vision,
        text_config=text | special,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=tokens,
        downsample_ratio=downsample_ratio,
        vision_feature_layer=layer,
        tie_word_embeddings=tie,
    )
    model: Any = t.InternVLForConditionalGeneration(config)
    randomize(model, seed)
    model.save_pretrained(directory)
    return directory
