"""Weights of a language model in 4 or 8 bits; activations stay floating point."""

from .generated import generation_inputs
from .quantize import quantize_weights

__all__ = ["generation_inputs", "quantize_weights"]
