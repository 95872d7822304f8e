"""Small random checkpoints of LLaVA and LLaVA-NeXT, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.checkpoints import edit_config, edit_weights, randomize, write_tokenizer

VICUNA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMALL_LLAMA: dict[str, Any] = {
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
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
}


def write_llava_checkpoint(
    directory: Path,
    *,
    anyres: bool = False,
    tower: str = "clip",
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    layer: int | list[int] = -2,
    select: str = "default",
    chat_template: str | None = VICUNA_TEMPLATE,
    grid_pinpoints: list[list[int]] | None = None,
    bias: bool = True,
    linear: bool = False,
    seed: int = 0,
) -> Path:
    """`LlavaForConditionalGeneration`, or `LlavaNextForConditionalGeneration` with `anyres`; returns `directory`.

    `linear`: one linear layer for projector, as LLaVA 1.0 had it.
    """
    import transformers as t
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = write_tokenizer(directory, text="llama")
    vision = {**SMALL_VISION, **(vision or {})}
    vision_class: Any = t.CLIPVisionConfig if tower == "clip" else t.SiglipVisionConfig
    text_config: Any = t.LlamaConfig(
        **{**SMALL_LLAMA, **(text or {})}, vocab_size=len(tokenizer) + 3, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    shared: dict[str, Any] = {
        "vision_config": vision_class(**vision),
        "text_config": text_config,
        "image_token_id": image_token_id,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": select,
        "multimodal_projector_bias": bias,
    }
    size = vision["image_size"]
    if anyres:
        pinpoints = grid_pinpoints or [[size, 2 * size], [2 * size, size], [2 * size, 2 * size], [3 * size, size]]
        config: Any = t.LlavaNextConfig(**shared, image_grid_pinpoints=pinpoints)
        model: Any = t.LlavaNextForConditionalGeneration(config)
        images: Any = LlavaNextImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_grid_pinpoints=pinpoints
        )
        make_processor: Any = t.LlavaNextProcessor
    else:
        model = t.LlavaForConditionalGeneration(t.LlavaConfig(**shared))
        images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        make_processor = t.LlavaProcessor
    randomize(model, seed)
    model.save_pretrained(directory)
    processor = make_processor(
        images, tokenizer, patch_size=vision["patch_size"], vision_feature_select_strategy=select,
        num_additional_image_tokens=int(tower == "clip"), chat_template=chat_template,
    )  # fmt: skip
    processor.save_pretrained(directory)
    if linear:
        edit_config(directory, mm_projector_type="linear")
        edit_weights(directory, _keep_one_linear)
    return directory


def _keep_one_linear(state: dict[str, Any]) -> None:
    """The projector of LLaVA 1.0 under its project's names."""
    for part in ("weight", "bias"):
        state.pop(f"multi_modal_projector.linear_2.{part}")
        state[f"model.mm_projector.{part}"] = state.pop(f"multi_modal_projector.linear_1.{part}")
