"""Small random checkpoints of LLaVA-OneVision and LLaVA-NeXT-Video, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.checkpoints import randomize, write_tokenizer
from tests.checkpoints_idefics3 import write_processor
from tests.checkpoints_llava import SMALL_LLAMA, SMALL_VISION

# As the hub's checkpoints have it: all pictures, then all videos, then the texts.
VIDEO_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Each where it stands in the message.
ORDERED_TEMPLATE = (
    "{% for message in messages %}{% for content in message['content'] %}"
    "{% if content['type'] == 'text' %}{{ content['text'] }}{% else %}{{ '[<' + content['type'] + '>]' }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def write_llava_onevision_checkpoint(
    directory: Path,
    *,
    tower: str = "siglip",
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    layer: int | list[int] = -1,
    max_tiles: int = 2,
    chat_template: str = VIDEO_TEMPLATE,
    tie: bool = False,
    seed: int = 0,
) -> Path:
    """`LlavaOnevisionForConditionalGeneration` with a Qwen2 decoder; returns `directory`."""
    import transformers as t
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tokenizer = _video_tokenizer(directory)
    vision = {**SMALL_VISION, "model_type": f"{tower}_vision_model", **(vision or {})}
    size, side = vision["image_size"], vision["image_size"] // vision["patch_size"]
    pinpoints = [[rows * size, columns * size] for rows in range(1, 4) for columns in range(1, 4)]
    images: Any = LlavaOnevisionImageProcessorPil(size={"height": size, "width": size}, image_grid_pinpoints=pinpoints)
    ratio, select = f"anyres_max_{max_tiles}", "full" if tower == "siglip" else "default"
    make_config: Any = t.LlavaOnevisionConfig  # its aliases (image_token_id) are not typed
    config = make_config(
        vision_config=vision,
        text_config=_text_config(tokenizer, {"model_type": "qwen2", **(text or {}), "tie_word_embeddings": tie}),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=layer,
        vision_feature_select_strategy=select,
        vision_aspect_ratio=ratio,
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=tie,
    )
    frames = {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "size": {"height": size, "width": size},
        "do_sample_frames": False,
    }
    # The processor takes one off for CLIP's class token.
    count = side * side + (select == "default")
    write_processor(
        directory, "LlavaOnevisionProcessor", images, tokenizer, chat_template, num_image_tokens=count,
        vision_feature_select_strategy=select, vision_aspect_ratio=ratio, video_processor=frames,
    )  # fmt: skip
    return _save(t.LlavaOnevisionForConditionalGeneration(config), directory, seed)


def write_llava_next_video_checkpoint(
    directory: Path,
    *,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    layer: int | list[int] = -2,
    mode: str = "average",
    stride: int = 2,
    chat_template: str = VIDEO_TEMPLATE,
    seed: int = 0,
) -> Path:
    """`LlavaNextVideoForConditionalGeneration` with a Llama decoder; returns `directory`."""
    import transformers as t
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = _video_tokenizer(directory)
    vision = {**SMALL_VISION, "model_type": "clip_vision_model", "projection_dim": 8, **(vision or {})}
    size = vision["image_size"]
    pinpoints = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
    crop = {"height": size, "width": size}
    images: Any = LlavaNextImageProcessorPil(
        size={"shortest_edge": size}, crop_size=crop, image_grid_pinpoints=pinpoints
    )
    config: Any = t.LlavaNextVideoConfig(
        vision_config=vision,
        text_config=_text_config(tokenizer, {"model_type": "llama", **(text or {})}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=layer,
        spatial_pool_mode=mode,
        spatial_pool_stride=stride,
        image_grid_pinpoints=pinpoints,
    )
    frames = {
        "video_processor_type": "LlavaNextVideoVideoProcessor",
        "size": {"shortest_edge": size},
        "crop_size": crop,
        "do_center_crop": True,
        "do_sample_frames": False,
    }
    write_processor(
        directory, "LlavaNextVideoProcessor", images, tokenizer, chat_template, patch_size=vision["patch_size"],
        vision_feature_select_strategy="default", num_additional_image_tokens=1, video_processor=frames,
    )  # fmt: skip
    return _save(t.LlavaNextVideoForConditionalGeneration(config), directory, seed)


def _video_tokenizer(directory: Path) -> Any:
    tokenizer = write_tokenizer(directory, text="llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    return tokenizer


def _text_config(tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {**SMALL_LLAMA, **options, **special, "vocab_size": len(tokenizer) + 3}


def _save(model: Any, directory: Path, seed: int) -> Path:
    randomize(model, seed)
    model.save_pretrained(directory)
    return directory
