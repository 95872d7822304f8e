"""Observers: what range of values a tensor needs, decided after one pass with bounded memory.

One `TensorObserver` per tensor keeps exact extremes, a histogram of floating-point bins and a few rows; the observers
themselves (`RANGE_OBSERVERS`) are functions of that summary, so that all of them come from the same pass.
"""

from .ranges import RANGE_OBSERVERS
from .settings import ObserverSettings
from .tensor import TensorObserver

__all__ = ["RANGE_OBSERVERS", "ObserverSettings", "TensorObserver"]
