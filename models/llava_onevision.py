"""LLaVA-OneVision checkpoints (Li et al. 2024, arXiv 2408.03326): pictures in tiles (AnyRes), several pictures, videos.

Encoder, projector and newline are those of LLaVA-NeXT. A frame's features are interpolated to half the side behind the
projector; interpolation is a weighted choice of rows, so the run time does it and one connector serves both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import llava_next
from .stages import Layout


def conditional_generation(config: Any) -> Layout:
    """`LlavaOnevisionForConditionalGeneration` in the stages encoder, connector, embed_tokens and llm."""
    return replace(llava_next.conditional_generation(config), kind="llava-onevision")
