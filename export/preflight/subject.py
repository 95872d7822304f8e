"""A graph under inspection: read once, asked by every check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import onnx
import onnx_ir as ir

from ...calibration.rules_graph import dtype_of
from ...runtime.tensorrt.versions import Version
from .findings import Finding, Severity

STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Subject:
    """A model (functions inlined, shapes and types inferred as far as they can be), and for whom it is checked."""

    path: Path
    model: ir.Model
    stage: str
    version: Version

    def finding(
        self, check: str, severity: Severity, node: str, why: str, fix: str, *, fixable: bool = False
    ) -> Finding:
        """A finding of this stage."""
        return Finding(check, severity, self.stage, node, why, fix, fixable)

    @cached_property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All nodes, those of subgraphs included."""
        return tuple(self.model.graph.all_nodes())

    def standard(self, *op_types: str) -> Iterator[ir.Node]:
        """Nodes of the standard domain with one of these types."""
        return (node for node in self.nodes if node.domain in STANDARD and node.op_type in op_types)

    @cached_property
    def opset(self) -> int:
        """Version of the standard operators; 0 when the graph imports none."""
        imports = self.model.graph.opset_imports
        return imports.get("", imports.get("ai.onnx", 0))

    @cached_property
    def computes_in_fp16(self) -> bool:
        """Whether any node other than a Cast or constant gives FP16."""
        return any(
            dtype_of(value) == ir.DataType.FLOAT16
            for node in self.nodes
            if node.op_type not in ("Cast", "Constant")
            for value in node.outputs
        )


def schema_of(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    """ONNX's definition of the node's operator; None for other domains and for what this opset does not have."""
    return _schema(node.op_type, opset) if node.domain in STANDARD else None


@cache
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None
