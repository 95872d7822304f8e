"""Room on the disk: asked for before an export starts, and every way of running out of it told as one error."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError
from .llm import scratch_bytes

if TYPE_CHECKING:
    from ..models.checkpoint import VisionLanguageModel

_FP32 = 4
_LLM_PREFIX = "language_model."
# Graphs, tokenizer and manifest, beside the weights.
_OVERHEAD = 64 << 20
# What a library says when a write fails and it does not raise an OSError (safetensors, from Rust).
_FULL = ("No space left on device", "os error 28", "Disk quota exceeded")


def fp32_bytes(model: VisionLanguageModel, prefix: str = "") -> int:
    """Bytes of the checkpoint's tensors whose name starts with `prefix`, in FP32."""
    entries = model.weights.entries.items()
    return _FP32 * sum(math.prod(entry.shape) for name, entry in entries if name.startswith(prefix))


def check_room(model: VisionLanguageModel, directory: Path) -> None:
    """Raise OutputError when the disk of `directory` has no room for the bundle and what building it needs."""
    text = model.config.text_config if model.text_config is None else model.text_config
    llm = fp32_bytes(model, _LLM_PREFIX)
    # The embedding is a stage of its own; where it is tied, the LM head holds a second copy.
    embedding = _FP32 * text.vocab_size * text.hidden_size
    needed = fp32_bytes(model) + embedding + scratch_bytes(model, llm) + _OVERHEAD
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OutputError(
            f"{directory} has {free / 1e9:.1f} GB free, this export needs up to {needed / 1e9:.1f} GB; free some space "
            "or name another disk"
        )


@contextmanager
def disk_full_as_os_error() -> Iterator[None]:
    """Turn what libraries raise on a full disk into the OSError that the caller's handler knows."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if any(text in str(error) for text in _FULL):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise
