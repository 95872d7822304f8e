"""The model families that Bridgeport reads: one record per `model_type` of a `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .stages import Layout


@dataclass(frozen=True)
class Family:
    """How checkpoints of one `model_type` are read.

    `module`: the sibling module that does it, imported on first use. `layouts`: for every architecture that
    `config.json` may name, the function there that takes the transformers config and gives the `Layout`.
    `config_class`: its class in transformers, or in `module` for a model that transformers does not have.
    """

    module: str
    config_class: str
    layouts: Mapping[str, str]

    def config_type(self) -> Any:
        """The class `config_class`."""
        import transformers

        found: Any = getattr(transformers, self.config_class, None)
        return found or getattr(import_module(f".{self.module}", __package__), self.config_class)

    def layout(self, architecture: str) -> Callable[[Any], Layout]:
        """The function that lays `architecture` out in stages; KeyError for one that is not in `layouts`."""
        function: Callable[[Any], Layout] = getattr(
            import_module(f".{self.module}", __package__), self.layouts[architecture]
        )
        return function


FAMILIES: dict[str, Family] = {
    "blip-2": Family(
        module="blip2",
        config_class="Blip2Config",
        layouts={
            "Blip2ForConditionalGeneration": "conditional_generation",
            "Blip2ForImageTextRetrieval": "image_text_retrieval",
        },
    ),
    "clip": Family(module="clip", config_class="CLIPConfig", layouts={"CLIPModel": "image_text_model"}),
    "siglip": Family(module="siglip", config_class="SiglipConfig", layouts={"SiglipModel": "image_text_model"}),
    "llava": Family(
        module="llava",
        config_class="LlavaConfig",
        layouts={"LlavaForConditionalGeneration": "conditional_generation"},
    ),
    "llava_next": Family(
        module="llava_next",
        config_class="LlavaNextConfig",
        layouts={"LlavaNextForConditionalGeneration": "conditional_generation"},
    ),
    "qwen": Family(module="qwen_vl_model", config_class="QwenVlConfig", layouts={"QWenLMHeadModel": "causal_lm"}),
    "qwen2_vl": Family(
        module="qwen2_vl",
        config_class="Qwen2VLConfig",
        layouts={"Qwen2VLForConditionalGeneration": "qwen2_vl"},
    ),
    "qwen2_5_vl": Family(
        module="qwen2_vl",
        config_class="Qwen2_5_VLConfig",
        layouts={"Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl"},
    ),
    "idefics": Family(
        module="idefics",
        config_class="IdeficsConfig",
        layouts={"IdeficsForVisionText2Text": "vision_text_to_text"},
    ),
    "idefics2": Family(
        module="idefics2",
        config_class="Idefics2Config",
        layouts={"Idefics2ForConditionalGeneration": "conditional_generation"},
    ),
    "idefics3": Family(
        module="idefics3",
        config_class="Idefics3Config",
        layouts={"Idefics3ForConditionalGeneration": "conditional_generation"},
    ),
    "smolvlm": Family(
        module="idefics3",
        config_class="SmolVLMConfig",
        layouts={"SmolVLMForConditionalGeneration": "smolvlm"},
    ),
    "internvl": Family(
        module="internvl",
        config_class="InternVLConfig",
        layouts={"InternVLForConditionalGeneration": "conditional_generation"},
    ),
    "llava_onevision": Family(
        module="llava_onevision",
        config_class="LlavaOnevisionConfig",
        layouts={"LlavaOnevisionForConditionalGeneration": "conditional_generation"},
    ),
    "llava_next_video": Family(
        module="llava_next_video",
        config_class="LlavaNextVideoConfig",
        layouts={"LlavaNextVideoForConditionalGeneration": "conditional_generation"},
    ),
    "instructblip": Family(
        module="instructblip",
        config_class="InstructBlipConfig",
        layouts={"InstructBlipForConditionalGeneration": "conditional_generation"},
    ),
    "instructblipvideo": Family(
        module="instructblip",
        config_class="InstructBlipVideoConfig",
        layouts={"InstructBlipVideoForConditionalGeneration": "video_generation"},
    ),
}
