"""PyTorch stages to ONNX graphs, and checkpoints to bundles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import export_checkpoint

__all__ = ["export_checkpoint"]


def __getattr__(name: str) -> Any:
    if name == "export_checkpoint":
        from .checkpoint import export_checkpoint

        return export_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
