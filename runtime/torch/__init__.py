"""Stages through PyTorch, from the checkpoint: the reference that the other engines are held against."""

from .loader import load_engines
from .runner import TorchEngine, TorchLanguageModel

__all__ = ["TorchEngine", "TorchLanguageModel", "load_engines"]
