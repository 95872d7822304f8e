"""The connector once more with its cross-attention as a second output, over the same weights file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir

from .passes import GraphPass, PassResult, apply_passes
from .passes.modules import module_stack
from .passes.weights import constant

OUTPUT = "cross_attention"
_CROSS_ATTENTION = re.compile(r"qformer\.layers\.(\d+)\.cross_attention")


class ExposeCrossAttention(GraphPass):
    """Add the output `cross_attention` `[B, layers that cross-attend, heads, Q, N]`: the softmax of each such layer."""

    name = "expose-cross-attention"
    mandatory = True

    def requires(self, model: ir.Model) -> str | None:
        """There must be a softmax that was traced in a layer's cross-attention."""
        return None if _softmaxes(model) else "no softmax of a cross-attention"

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Stack the softmaxes in the order of the layers."""
        axis = constant(model, f"{OUTPUT}/axis", np.array([1], np.int64))
        parts = []
        for layer, softmax in sorted(_softmaxes(model).items()):
            part = ir.node("Unsqueeze", [softmax.outputs[0], axis], name=f"{OUTPUT}/{layer}/Unsqueeze")
            part.outputs[0].name = f"{OUTPUT}/{layer}"
            parts.append(part)
        stacked = ir.node("Concat", [part.outputs[0] for part in parts], {"axis": 1}, name=f"{OUTPUT}/Concat")
        output = stacked.outputs[0]
        shape = next(iter(_softmaxes(model).values())).outputs[0].shape
        output.name, output.type = OUTPUT, ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape([shape[0], len(parts), *shape[1:]]) if shape is not None else None
        model.graph.extend([*parts, stacked])
        model.graph.outputs.append(output)
        return model, True


def write_attention_variant(path: Path, out: Path) -> tuple[PassResult, ...]:
    """Read the connector's graph at `path`, write the variant to `out` in the same directory.

    Its weights are those of `path`: the same bytes of the same external file, none of them copied.
    """
    model, results = apply_passes(ir.load(path), (ExposeCrossAttention(),), stage="connector")
    ir.save(model, out)
    return results


def _softmaxes(model: ir.Model) -> dict[int, ir.Node]:
    """Layer -> the softmax of its cross-attention."""
    found = {}
    for node in model.graph:
        stack = module_stack(node) if node.op_type == "Softmax" else []
        match = _CROSS_ATTENTION.fullmatch(stack[-1]) if stack else None
        if match is not None:
            found[int(match[1])] = node
    return found
