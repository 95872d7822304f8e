"""Bundles of ONNX graphs to bundles of TensorRT engines, here or on a machine that has only TensorRT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import build_bundle
    from .emit import emit_script
    from .pack import pack_bundle
    from .sign import sign_bundle, verify_bundle

_HOMES = {
    "build_bundle": "build",
    "emit_script": "emit",
    "pack_bundle": "pack",
    "sign_bundle": "sign",
    "verify_bundle": "sign",
}

__all__ = ["build_bundle", "emit_script", "pack_bundle", "sign_bundle", "verify_bundle"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
