"""The vision stages through Torch-TensorRT, compiled from the checkpoint; the others through ONNX Runtime."""

from .loader import compile_stage, load_engines
from .runner import TorchTensorRtEngine

__all__ = ["TorchTensorRtEngine", "compile_stage", "load_engines"]
