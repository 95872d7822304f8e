"""What pictures cost a model: visual tokens, context, parameters, FLOPs and time, from the code that exports and runs.

Nothing here imports torch before it is needed: a bundle, and the table of known models, are counted without it.
"""

from __future__ import annotations

from .count import ModelReport, PictureReport, count_tokens
from .pictures import Size
from .subjects import Subject, open_subject

__all__ = ["ModelReport", "PictureReport", "Size", "Subject", "count_tokens", "open_subject"]
