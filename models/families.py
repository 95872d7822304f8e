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
    `config_class`: its class in transformers.
    """

    module: str
    config_class: str
    layouts: Mapping[str, str]

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
}
