"""What is frozen of a checkpoint's processor, whatever kind of checkpoint that is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..manifest import GenerationContract, ImageContract, PromptContract


@dataclass(frozen=True)
class FrozenProcessor:
    """The contracts, the frozen `tokenizer.json`, and for the manifest what they were checked on."""

    image: ImageContract
    prompt: PromptContract
    generation: GenerationContract
    tokenizer: Path
    checks: dict[str, Any]
    video: ImageContract | None = None
