"""Models that `bridgeport tokens` knows by name: values of their published configs and processors, written down.

No weight and no file of theirs is here. A config is what transformers' config class takes; keys that say nothing about
sizes are left out. `image` is what the processor does; that the two fit each other is tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...image_contract import (
    AnyRes,
    CenterCrop,
    Crops,
    ImageContract,
    Normalize,
    Padded,
    Patches,
    Rescale,
    Resize,
    ResizeShortest,
    Split,
    Whole,
)


@dataclass(frozen=True)
class KnownModel:
    """One published model.

    `config`: for the class of `config["model_type"]` in `models.families`; `architecture`: its layout there.
    `context`: tokens of the language model; None where there is none. `source`: whose config this is.
    """

    architecture: str
    config: dict[str, Any]
    image: ImageContract
    context: int | None
    source: str


_NUMBERS = (
    Rescale(factor=1 / 255),
    Normalize(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)),
)
_HALF = (Rescale(factor=1 / 255), Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
_IMAGENET = (Rescale(factor=1 / 255), Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))


def _cropped(edge: int) -> tuple[Any, ...]:
    """CLIP's processor: the shorter edge resized, then the middle."""
    return (ResizeShortest(size=edge, resample="bicubic"), CenterCrop(height=edge, width=edge), *_NUMBERS)


def _squeezed(edge: int) -> tuple[Any, ...]:
    """BLIP's processor: a square, the aspect ratio ignored."""
    return (Resize(height=edge, width=edge, resample="bicubic"), *_NUMBERS)


_VIT_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_VIT_G = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}
_GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def _llava(model_type: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vision_config": _VIT_L | {"image_size": 336},
        "text_config": _LLAMA_7B,
        "image_token_id": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        **more,
    }


def _qformer_model(model_type: str, text: dict[str, Any], image_token: int, **qformer: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vision_config": _VIT_G,
        "qformer_config": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, **qformer},
        "text_config": text,
        "num_query_tokens": 32,
        "image_token_index": image_token,
    }


def _qwen_vl(model_type: str, vision: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    shared = {
        "num_hidden_layers": 28,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    return {
        "model_type": model_type,
        "vision_config": {"depth": 32, "num_heads": 16, "patch_size": 14, **vision},
        "text_config": {**shared, **text},
        "image_token_id": 151655,
        "tie_word_embeddings": text["hidden_size"] < 3584,
    }


def _qwen_text(hidden: int, intermediate: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 152064 if hidden == 3584 else 151936,
        **more,
    }


def _patches(window: int | None = None) -> ImageContract:
    tiling = Patches(
        patch_size=14, temporal_patch_size=2, merge_size=2, min_pixels=3136, max_pixels=12_845_056,
        resample="bicubic", window_size=window,
    )  # fmt: skip
    return ImageContract(steps=_NUMBERS, tiling=tiling)


_QWEN2_TEXT_2B = _qwen_text(1536, 8960, 12, 2)
_QWEN2_TEXT_7B = _qwen_text(3584, 18944, 28, 4)
_QWEN25_TEXT_3B = _qwen_text(2048, 11008, 16, 2, num_hidden_layers=36, max_position_embeddings=128_000)


def _qwen25_vision(out: int) -> dict[str, Any]:
    return {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "out_hidden_size": out,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }


KNOWN: dict[str, KnownModel] = {
    "llava-1.5-7b": KnownModel(
        architecture="LlavaForConditionalGeneration",
        config=_llava("llava"),
        image=ImageContract(steps=_cropped(336), tiling=Whole(tokens=576)),
        context=4096,
        source="llava-hf/llava-1.5-7b-hf",
    ),
    "llava-next-7b": KnownModel(
        architecture="LlavaNextForConditionalGeneration",
        config=_llava("llava_next", image_grid_pinpoints=[list(grid) for grid in _GRIDS]),
        image=ImageContract(
            steps=_cropped(336), tiling=AnyRes(grids=_GRIDS, tile=336, view=336, side=24, resample="bicubic")
        ),
        context=4096,
        source="llava-hf/llava-v1.6-vicuna-7b-hf",
    ),
    "blip2-opt-2.7b": KnownModel(
        architecture="Blip2ForConditionalGeneration",
        config=_qformer_model(
            "blip-2",
            {
                "model_type": "opt",
                "hidden_size": 2560,
                "word_embed_proj_dim": 2560,
                "ffn_dim": 10240,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "vocab_size": 50304,
                "max_position_embeddings": 2048,
            },
            50265,
        ),
        image=ImageContract(steps=_squeezed(224), tiling=Whole(tokens=32)),
        context=2048,
        source="Salesforce/blip2-opt-2.7b",
    ),
    "blip2-flan-t5-xl": KnownModel(
        architecture="Blip2ForConditionalGeneration",
        config=_qformer_model(
            "blip-2",
            {
                "model_type": "t5",
                "d_model": 2048,
                "d_kv": 64,
                "d_ff": 5120,
                "num_layers": 24,
                "num_heads": 32,
                "vocab_size": 32128,
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
            },
            32100,
        ),
        image=ImageContract(steps=_squeezed(224), tiling=Whole(tokens=32)),
        context=2048,  # T5 itself has no longest prompt; this is the bound of the exported graph
        source="Salesforce/blip2-flan-t5-xl",
    ),
    "instructblip-vicuna-7b": KnownModel(
        architecture="InstructBlipForConditionalGeneration",
        config=_qformer_model(
            "instructblip",
            _LLAMA_7B | {"vocab_size": 32001, "max_position_embeddings": 2048},
            32000,
            vocab_size=30523,
        ),
        image=ImageContract(steps=_squeezed(224), tiling=Whole(tokens=32)),
        context=2048,
        source="Salesforce/instructblip-vicuna-7b",
    ),
    "idefics-9b": KnownModel(
        architecture="IdeficsForVisionText2Text",
        config={
            "model_type": "idefics",
            "vision_config": {"embed_dim": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "image_size": 224},
            "perceiver_config": {"use_resampler": True, "resampler_n_latents": 64, "resampler_depth": 6},
            "use_resampler": True,
            "cross_layer_interval": 4,
            "qk_layer_norms": True,
            "additional_vocab_size": 2,
        },
        image=ImageContract(steps=_squeezed(224), tiling=Whole(tokens=64, words=1)),
        context=2048,
        source="HuggingFaceM4/idefics-9b (Flamingo's design)",
    ),
    "idefics2-8b": KnownModel(
        architecture="Idefics2ForConditionalGeneration",
        config={
            "model_type": "idefics2",
            "vision_config": _SO400M | {"image_size": 980},
            "perceiver_config": {"resampler_n_latents": 64, "resampler_depth": 3},
            "text_config": {"model_type": "mistral", "vocab_size": 32003, "max_position_embeddings": 32768},
            "image_token_id": 32001,
        },
        image=ImageContract(
            steps=_HALF,
            tiling=Padded(tokens=64, shortest_edge=378, longest_edge=980, resample="bilinear", splitting=True),
        ),
        context=32768,
        source="HuggingFaceM4/idefics2-8b",
    ),
    "idefics3-8b": KnownModel(
        architecture="Idefics3ForConditionalGeneration",
        config={
            "model_type": "idefics3",
            "vision_config": _SO400M | {"image_size": 364},
            "text_config": _LLAMA_7B
            | {
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "vocab_size": 128_259,
                "max_position_embeddings": 131_072,
            },
            "image_token_id": 128_257,
            "scale_factor": 2,
        },
        image=ImageContract(
            steps=_HALF, tiling=Split(tokens=169, longest_edge=1456, tile_size=364, resample="lanczos", splitting=True)
        ),
        context=131_072,
        source="HuggingFaceM4/Idefics3-8B-Llama3",
    ),
    "smolvlm2-2.2b": KnownModel(
        architecture="SmolVLMForConditionalGeneration",
        config={
            "model_type": "smolvlm",
            "vision_config": _SO400M | {"image_size": 384},
            "text_config": {
                "model_type": "llama",
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 24,
                "num_attention_heads": 32,
                "head_dim": 64,
                "vocab_size": 49280,
                "max_position_embeddings": 8192,
            },
            "image_token_id": 49190,
            "scale_factor": 3,
        },
        image=ImageContract(
            steps=_HALF, tiling=Split(tokens=81, longest_edge=1536, tile_size=384, resample="lanczos", splitting=True)
        ),
        context=8192,
        source="HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    ),
    "internvl3-1b": KnownModel(
        architecture="InternVLForConditionalGeneration",
        config={
            "model_type": "internvl",
            "vision_config": {"image_size": [448, 448], "attention_bias": True},
            "text_config": {
                "model_type": "qwen2",
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "vocab_size": 151_674,
                "max_position_embeddings": 32768,
            },
            "image_token_id": 151_667,
            "tie_word_embeddings": False,
        },
        image=ImageContract(
            steps=(Resize(height=448, width=448, resample="bicubic"), *_IMAGENET),
            tiling=Crops(tokens=256, height=448, width=448, min_tiles=1, max_tiles=12, resample="bicubic"),
        ),
        context=32768,
        source="OpenGVLab/InternVL3-1B-hf",
    ),
    "qwen2-vl-2b": KnownModel(
        architecture="Qwen2VLForConditionalGeneration",
        config=_qwen_vl("qwen2_vl", {"embed_dim": 1280, "hidden_size": 1536}, _QWEN2_TEXT_2B),
        image=_patches(),
        context=32768,
        source="Qwen/Qwen2-VL-2B-Instruct",
    ),
    "qwen2-vl-7b": KnownModel(
        architecture="Qwen2VLForConditionalGeneration",
        config=_qwen_vl("qwen2_vl", {"embed_dim": 1280, "hidden_size": 3584}, _QWEN2_TEXT_7B),
        image=_patches(),
        context=32768,
        source="Qwen/Qwen2-VL-7B-Instruct",
    ),
    "qwen2.5-vl-3b": KnownModel(
        architecture="Qwen2_5_VLForConditionalGeneration",
        config=_qwen_vl("qwen2_5_vl", _qwen25_vision(2048), _QWEN25_TEXT_3B),
        image=_patches(window=112),
        context=128_000,
        source="Qwen/Qwen2.5-VL-3B-Instruct",
    ),
    "qwen2.5-vl-7b": KnownModel(
        architecture="Qwen2_5_VLForConditionalGeneration",
        config=_qwen_vl("qwen2_5_vl", _qwen25_vision(3584), _QWEN2_TEXT_7B | {"max_position_embeddings": 128_000}),
        image=_patches(window=112),
        context=128_000,
        source="Qwen/Qwen2.5-VL-7B-Instruct",
    ),
    "clip-vit-l-14": KnownModel(
        architecture="CLIPModel",
        config={
            "model_type": "clip",
            "projection_dim": 768,
            "vision_config": _VIT_L | {"image_size": 224},
            "text_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
            },
        },
        image=ImageContract(steps=_cropped(224), tiling=Whole(tokens=1)),
        context=None,
        source="openai/clip-vit-large-patch14",
    ),
}

# What `bridgeport tokens` shows when nothing is named: a picture as patches, as queries and as tiles.
WELL_KNOWN = ("llava-1.5-7b", "blip2-opt-2.7b", "llava-next-7b")
WELL_KNOWN_CONTEXT = 4096
