"""A decoder of ONNX Runtime's operators to one of ai.onnx operators, opset 20, which every TensorRT from 10.3 reads.

The cache changes with it. GroupQueryAttention writes into one buffer; here `present = Concat(past, new)` along the
sequence, so `past` `[B, kv_heads, P, size]` gives `present` `[B, kv_heads, P + S, size]` and P is 0 in a prefill.
`attention_mask` `[B, P + S]` says which places of the cache and of the new tokens hold a token of the row: prompts are
padded on the right as before, and the padding stays in the cache as places that the mask leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..graph import save_graph
from .base import GraphPass, PassResult, apply_passes
from .standard_decoder_attention import StandardAttention
from .standard_decoder_norm import ExplicitRmsNorm
from .standard_decoder_places import WholeNumberClip

OPSET = 20


def standard_decoder_passes() -> Sequence[GraphPass]:
    """From the graph of a bundle's FP32 `llm`, in order; the graph keeps its inputs and outputs."""
    return (ExplicitRmsNorm(), StandardAttention(), WholeNumberClip(), LowerOpset(OPSET))


def write_standard_decoder(decoder: Path, out: Path) -> tuple[PassResult, ...]:
    """Write the standard form of `decoder` to `out`, its weights beside it as ``<name>.data``.

    Raises ExportError for a graph with an operator that has no standard form here.
    """
    model, results = apply_passes(ir.load(decoder), standard_decoder_passes(), stage="llm")
    save_graph(model, out)
    return results


class LowerOpset(GraphPass):
    """Declare an older opset for a graph whose operators mean the same in it."""

    name = "lower-opset"
    mandatory = True

    def __init__(self, opset: int) -> None:
        self.opset = opset

    def requires(self, model: ir.Model) -> str | None:
        """Every operator, with its attributes and number of inputs, must be in the older set."""
        current = model.graph.opset_imports[""]
        if current <= self.opset:
            return None
        reasons = (_newer(node, current, self.opset) for node in model.graph)
        return next((reason for reason in reasons if reason is not None), None)

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Set the opset; no node changes. Domains that no node is of are dropped."""
        current = model.graph.opset_imports[""]
        RemoveUnusedNodesPass()(model)
        used = {node.domain for node in model.graph}
        for domain in set(model.graph.opset_imports) - used - {""}:
            del model.graph.opset_imports[domain]
        model.graph.opset_imports[""] = min(current, self.opset)
        return model, current > self.opset

    def ensures(self, model: ir.Model) -> str | None:
        """All nodes are of the default domain and in its opset."""
        for node in model.graph:
            if node.domain != "" or not onnx.defs.has(node.op_type, model.graph.opset_imports[""]):
                return f"{node.name} is a {node.domain or 'ai.onnx'} {node.op_type}"
        return None


def _newer(node: ir.Node, current: int, opset: int) -> str | None:
    """None, or why the node cannot be read with the older opset.

    Between 20 and 25 the operators of decoders changed in the types that they accept, not in what they compute.
    """
    if node.domain != "":
        return f"{node.name} is a {node.domain} {node.op_type}"
    if not onnx.defs.has(node.op_type, opset):
        return f"{node.name}: {node.op_type} is not in opset {opset}"
    old = onnx.defs.get_schema(node.op_type, opset)
    extra = set(node.attributes) - set(old.attributes)
    if extra or len(node.inputs) > old.max_input:
        return (
            f"{node.name}: {node.op_type} of opset {current} has {sorted(extra) or len(node.inputs)}, not so in {opset}"
        )
    return None
