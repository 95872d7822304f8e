"""What would stop or hurt a TensorRT build, found without a GPU and without TensorRT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .findings import Finding, Severity, sort_findings
    from .graph import check_graph

# The checks need onnx; `build` reads the table of devices on a board that has none.
_HOMES = {"Finding": "findings", "Severity": "findings", "check_graph": "graph", "sort_findings": "findings"}

__all__ = ["Finding", "Severity", "check_graph", "sort_findings"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
