"""Bundles at run time: engines, the chain, generation, parity, bench; without torch and transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .parity import ParityReport, check_parity
    from .pipeline import Pipeline
    from .sources import Video

_HOMES = {"ParityReport": "parity", "Pipeline": "pipeline", "Video": "sources", "check_parity": "parity"}

__all__ = ["ParityReport", "Pipeline", "Video", "check_parity"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
