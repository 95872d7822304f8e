"""Which PyTorch module a node was traced in: kept in the file, for whoever compares the two.

torch.onnx writes the module stack of every node (`pkg.torch.onnx.name_scopes`) among much else, source paths of the
exporting machine included. The stack stays, the rest goes.
"""

from __future__ import annotations

import ast

import onnx_ir as ir

from .base import GraphPass

SCOPES = "pkg.torch.onnx.name_scopes"


class KeepModuleScopes(GraphPass):
    """Drop the exporter's notes on model, nodes and values, except the module stack of each node."""

    name = "keep-module-scopes"

    def requires(self, model: ir.Model) -> str | None:
        """torch.onnx must have written the graph."""
        return None if any(SCOPES in node.metadata_props for node in model.graph) else f"no node has {SCOPES}"

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Clear all metadata but the stacks."""
        for node in model.graph:
            scopes = node.metadata_props.get(SCOPES)
            node.metadata_props.clear()
            node.doc_string = None
            if scopes is not None:
                node.metadata_props[SCOPES] = scopes
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*model.graph.inputs, *model.graph.initializers.values()):
            value.metadata_props.clear()
        model.metadata_props.clear()
        model.graph.metadata_props.clear()
        model.graph.doc_string = model.doc_string = None
        return model, True

    def ensures(self, model: ir.Model) -> str | None:
        """The stacks are there and nothing else is."""
        extra = {key for node in model.graph for key in node.metadata_props} - {SCOPES}
        if extra:
            return f"metadata {sorted(extra)} is left"
        return self.requires(model)


def module_stack(node: ir.Node) -> list[str]:
    """Fully-qualified names of the modules that the node was traced in, outermost first, without the root."""
    written = node.metadata_props.get(SCOPES)
    if not written:
        return []
    scopes = [str(scope) for scope in ast.literal_eval(written)]
    # The last entry names the operation; the root is ''; nodes of no module hold a placeholder.
    return [scope for scope in scopes[:-1] if scope and not scope.startswith("_")]
