"""Connectors, stage contracts and checkpoint readers.

Names are looked up on first use, so importing this package (or `contract`, which the run time needs on a board
without torch) does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import CrossAttention
    from .checkpoint import VisionLanguageModel, load_checkpoint
    from .contract import Axis, StageContract, TensorSpec
    from .qformer import QFormer, QFormerConfig, SelfAttentionMask
    from .registry import register_connector

_HOMES = {
    "Axis": "contract",
    "CrossAttention": "attention",
    "QFormer": "qformer",
    "QFormerConfig": "qformer",
    "SelfAttentionMask": "qformer",
    "StageContract": "contract",
    "TensorSpec": "contract",
    "VisionLanguageModel": "checkpoint",
    "load_checkpoint": "checkpoint",
    "register_connector": "registry",
}

__all__ = [
    "Axis",
    "CrossAttention",
    "QFormer",
    "QFormerConfig",
    "SelfAttentionMask",
    "StageContract",
    "TensorSpec",
    "VisionLanguageModel",
    "load_checkpoint",
    "register_connector",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
