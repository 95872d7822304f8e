"""Bridgeport: a trained vision-language model, exported, quantised, run as a chain and proved equal to PyTorch.

Importing this package imports neither torch nor onnxruntime; the sub-packages import what they need on use.
"""

from ._version import __version__

__all__ = ["__version__"]
