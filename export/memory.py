"""Giving memory back between stages, so that the peak of an export is one stage and not all of them."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc


def release_memory() -> None:
    """Collect cycles (torch modules and traced graphs hold many) and hand freed heap pages back to the system.

    glibc keeps freed arenas for reuse; `malloc_trim` returns them. On other C libraries only the collection is done.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
