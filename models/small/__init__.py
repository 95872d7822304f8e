"""The small trained model that ships with the package: its pictures, its weights and the recipe that made
them.

Importing this imports neither torch nor transformers: ``pictures`` and :func:`checkpoint_path` are what the
run time needs. ``python -m bridgeport.models.small --out DIR`` trains it again.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ...errors import CheckpointError

__all__ = ["checkpoint_path"]


def checkpoint_path() -> Path:
    """The trained ``Blip2ForConditionalGeneration`` directory, as installed."""
    path = Path(str(files(__name__) / "checkpoint"))
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"the small model's checkpoint is not at {path}; reinstall bridgeport, "
            "or train it with `python -m bridgeport.models.small --out DIR`"
        )
    return path
