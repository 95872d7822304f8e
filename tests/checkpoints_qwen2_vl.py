"""Small random checkpoints of Qwen2-VL and Qwen2.5-VL, as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file

from tests.checkpoints import randomize

Generation = Literal["2", "2.5"]

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL_TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]},
}
SMALL_VISION: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": 7}
# Windows of 2 x 2 tokens; the first and the last block attend to all.
SMALL_WINDOWS: dict[str, Any] = {"intermediate_size": 40, "window_size": 28, "fullatt_block_indexes": [0, 2]}
MIN_PIXELS, MAX_PIXELS = 28 * 28, 84 * 84


def write_qwen2_vl_checkpoint(
    directory: Path,
    generation: Generation = "2",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    tie: bool = False,
    names: Literal["saved", "new"] = "saved",
    seed: int = 0,
) -> Path:
    """`Qwen2VLForConditionalGeneration` or `Qwen2_5_VLForConditionalGeneration`; returns `directory`.

    `names`: those that `save_pretrained` writes, which are those of the hub ("visual.", "model.layers."), or those of
    the modules since transformers 4.52 ("model.visual.", "model.language_model.layers.").
    """
    import transformers as t
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = write_tokenizer(directory)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS}
    text_config = {
        **SMALL_TEXT, **(text or {}), "vocab_size": len(tokenizer) + 3, "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    width = text_config["hidden_size"]
    if generation == "2":
        sizes: dict[str, Any] = {**SMALL_VISION, "embed_dim": 32, "hidden_size": width, "mlp_ratio": 2}
        make: tuple[Any, Any] = t.Qwen2VLConfig, t.Qwen2VLForConditionalGeneration
    else:
        sizes = {**SMALL_VISION, **SMALL_WINDOWS, "hidden_size": 32, "out_hidden_size": width}
        make = t.Qwen2_5_VLConfig, t.Qwen2_5_VLForConditionalGeneration
    config = make[0](
        text_config=text_config,
        vision_config=sizes | (vision or {}),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie,
    )
    model = make[1](config)
    randomize(model, seed)
    model.tie_weights()
    model.save_pretrained(directory)
    if names == "new":
        _rename(directory, model)
    images: Any = Qwen2VLImageProcessorPil(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        patch_size=sizes["patch_size"],
        temporal_patch_size=config.vision_config.temporal_patch_size,
        merge_size=config.vision_config.spatial_merge_size,
    )
    images.save_pretrained(directory)
    _name_processor(directory, generation)
    return directory


def write_tokenizer(directory: Path) -> Any:
    """One token per byte and Qwen's special ones; no BOS is put in front, as with Qwen's own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast  # its constructor is not typed
    fast = make(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return fast


def _rename(directory: Path, model: Any) -> None:
    file = directory / "model.safetensors"
    stored = load_file(file)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    state = state if len(state) == len(stored) else {k: v for k, v in state.items() if k != "lm_head.weight"}
    if len(state) != len(stored) or set(state) == set(stored):
        raise AssertionError("transformers stores other names than it did; see which, and rename")
    save_file(state, file, metadata={"format": "pt"})


def _name_processor(directory: Path, generation: Generation) -> None:
    """What `Qwen2VLProcessor.save_pretrained` would add; its video part needs torchvision."""
    file = directory / "preprocessor_config.json"
    config = json.loads(file.read_text())
    config["processor_class"] = "Qwen2VLProcessor" if generation == "2" else "Qwen2_5_VLProcessor"
    file.write_text(json.dumps(config, indent=2))
