"""What reading a graph shows without running it: faults too small for the numbers of one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .causes import epsilon_cause
from .probes import Probe
from .report import Finding

# A symmetric 4-bit block has steps of one scale from -8 to 7: rounding moves a weight by half a step, and one that
# would need 8 by a whole one. The rest is for scales that were stored in FP16.
MAX_STEPS = 1.05


def audit_epsilons(graph: Any, probes: Sequence[Probe], reference: Any) -> tuple[Finding, ...]:
    """A finding for each normalisation node of `graph` whose epsilon is not that of PyTorch's module."""
    found = []
    for probe in probes:
        module = reference.get_submodule(probe.modules[0])
        if probe.side == "output" and (text := epsilon_cause(graph.node[probe.index], module)):
            found.append(Finding(probe.node, text))
    return tuple(found)


def audit_int4_weights(decoder: Path, language_model: Any) -> tuple[Finding, ...]:
    """A finding for each 4-bit weight that no rounding of the checkpoint's weight gives.

    `language_model`: transformers' module, still with the checkpoint's weights.
    """
    import onnx_ir as ir

    from ...export.llm.dequantize import dequantize, linear_names

    found = []
    for node in ir.load(decoder).graph:
        if node.op_type != "MatMulNBits":
            continue
        names = linear_names(node)
        weights = [language_model.get_submodule(name).weight.detach().numpy() for name in names]
        expected, rounded = np.concatenate(weights), dequantize(node)
        steps = _steps(node, rounded.shape)
        error = np.abs(rounded - expected) / np.maximum(steps, np.finfo(np.float32).tiny)
        at = np.unravel_index(int(error.argmax()), error.shape)
        if not error[at] <= MAX_STEPS:
            text = (
                f"{node.name} holds {float(rounded[at]):.4g} at {[int(i) for i in at]} of {'+'.join(names)}.weight, "
                f"the checkpoint {float(expected[at]):.4g}: {float(error[at]):.1f} quantisation steps apart"
            )
            found.append(Finding(str(node.name), text))
    return tuple(found)


def _steps(node: Any, shape: tuple[int, ...]) -> Any:
    """The quantisation step of every weight, `[N, K]`."""
    scales = np.abs(node.inputs[2].const_value.numpy().astype(np.float32)).reshape(shape[0], -1)
    block = node.attributes.get_int("block_size")
    return np.repeat(scales, block, axis=1)[:, : shape[1]]
