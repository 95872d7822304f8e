"""Small random checkpoints of Idefics2, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.checkpoints import randomize, write_tokenizer

SMALL_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
SMALL_VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 42,
    "patch_size": 7,
}
SMALL_PERCEIVER: dict[str, Any] = {
    "resampler_n_latents": 4,
    "resampler_depth": 2,
    "resampler_n_heads": 4,
    "num_key_value_heads": 2,
    "resampler_head_dim": 6,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() }}:{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<image>' }}{% else %}{{ ' ' + content['text'] }}{% endif %}{% endfor %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def write_idefics2_checkpoint(
    directory: Path,
    *,
    vision: dict[str, Any] | None = None,
    perceiver: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    tie: bool = False,
    splitting: bool = False,
    seed: int = 0,
) -> Path:
    """`Idefics2ForConditionalGeneration` with a Mistral decoder; returns `directory`."""
    import transformers as t
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    tokenizer = write_tokenizer(directory, text="llama")
    vision = {**SMALL_VISION, **(vision or {})}
    perceiver = {**SMALL_PERCEIVER, **(perceiver or {})}
    edges = {"longest_edge": vision["image_size"], "shortest_edge": vision["image_size"] // 2}
    images: Any = Idefics2ImageProcessorPil(size=edges, do_image_splitting=splitting)
    make_processor: Any = t.Idefics2Processor
    processor = make_processor(
        images, tokenizer, image_seq_len=perceiver["resampler_n_latents"], chat_template=CHAT_TEMPLATE
    )
    text = {**SMALL_TEXT, **(text or {}), "model_type": "mistral", "vocab_size": len(tokenizer) + 3}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config: Any = t.Idefics2Config(
        vision_config=vision,
        text_config=text | special,
        perceiver_config={**perceiver, "hidden_size": text["hidden_size"], "rms_norm_eps": 1e-5},
        image_token_id=processor.image_token_id,
        tie_word_embeddings=tie,
    )
    model: Any = t.Idefics2ForConditionalGeneration(config)
    randomize(model, seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
