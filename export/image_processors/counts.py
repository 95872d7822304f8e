"""What the processor's files say about image tokens, held against what the model makes.

The processors themselves are not loaded: those with a video part need torchvision, whatever they are asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..checkpoint_processor import load_tokenizer

_FILE = "processor_config.json"


def check_count(path: Path, setting: str, count: int) -> int:
    """`count`, the features that the model makes of a tile; CheckpointError where processor_config.json has another."""
    named = _settings(path / _FILE).get(setting, count)
    if named != count:
        raise CheckpointError(
            f"{path}: {setting} of {_FILE} is {named}, and the model makes {count} features of a tile; "
            f"set it to {count}"
        )
    return count


def token_text(path: Path, name: str, default: str | None = None) -> str:
    """The text of the tokenizer's special token `name`, or `default`; CheckpointError where there is neither."""
    text = getattr(load_tokenizer(path), name, default)
    if text is None:
        raise CheckpointError(
            f"{path}: the tokenizer has no {name}; add it to extra_special_tokens of tokenizer_config.json"
        )
    return str(text)


def _settings(file: Path) -> dict[str, Any]:
    """The file's entries, none where there is no file: the model's own count holds then."""
    if not file.is_file():
        return {}
    try:
        settings: Any = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); copy the checkpoint again") from error
    return settings if isinstance(settings, dict) else {}
