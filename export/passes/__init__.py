"""Graph passes: each says what it requires, runs, and says what it ensures.

The shape of the infrastructure follows onnx-ir's `passes/_pass_infra.py` (requires, call, ensures); a pass that does
not apply declines with its reason, and the reasons end in the manifest.
"""

from .base import GraphPass, PassResult, apply_passes

__all__ = ["GraphPass", "PassResult", "apply_passes"]
