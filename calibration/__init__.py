"""Precision: calibration data, observers, smoothing, Q/DQ placement, and the gate that a quantised bundle passes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gate import GateLimits, GateReport
    from .options import QuantizeOptions
    from .quantize import GateFailed, quantize_bundle

__all__ = ["GateFailed", "GateLimits", "GateReport", "QuantizeOptions", "quantize_bundle"]

# Imported when they are asked for: the command line knows the verb without loading what it needs.
_HOMES = {
    "GateFailed": "quantize",
    "GateLimits": "gate",
    "GateReport": "gate",
    "QuantizeOptions": "options",
    "quantize_bundle": "quantize",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
