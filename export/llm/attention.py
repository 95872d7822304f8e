"""What a text config says about attention and positions, in one place for every builder."""

from __future__ import annotations

from typing import Any

# The axes of M-RoPE (Wang et al. 2024, arXiv 2409.12191): time, height and width.
MROPE_AXES = 3
_FULL, _SLIDING = "full_attention", "sliding_attention"


def sliding_windows(text_config: Any) -> dict[int, int]:
    """Layer -> how many tokens a token sees, itself among them, for the layers that do not see all.

    Mistral has one window for all layers, Qwen2 names the layers. A window that holds the whole context is none.
    """
    size = getattr(text_config, "sliding_window", None)
    if size is None or size >= text_config.max_position_embeddings:
        return {}
    layers = getattr(text_config, "layer_types", None) or [_SLIDING] * text_config.num_hidden_layers
    return {layer: size for layer, kind in enumerate(layers) if kind == _SLIDING}


def unknown_attention(text_config: Any) -> str | None:
    """None, or the kind of attention that is neither full nor sliding."""
    known = (_FULL, _SLIDING)
    other = [kind for kind in getattr(text_config, "layer_types", None) or () if kind not in known]
    return f"layer type {other[0]!r}; built are {', '.join(known)}" if other else None


def position_axes(text_config: Any) -> int:
    """How many numbers a position has: 3 with M-RoPE, where they come in as `position_ids` `[3, B, S]`, else 1."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    return MROPE_AXES if rope.get("mrope_section") else 1
