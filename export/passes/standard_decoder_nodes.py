"""Nodes that a rewrite puts before another one: named, typed, and of the same module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from .modules import SCOPES


class NodeWriter:
    """Inserts nodes before `anchor`, named ``<prefix>/<label>``; their outputs have the type of their first input.

    `dtype` in `add` gives another type. The anchor's module stack goes along.
    """

    def __init__(self, model: ir.Model, anchor: ir.Node, prefix: str) -> None:
        self.model = model
        self.anchor = anchor
        self.prefix = prefix
        scopes = anchor.metadata_props.get(SCOPES)
        self._metadata = None if scopes is None else {SCOPES: scopes}

    def add(
        self,
        op_type: str,
        label: str,
        inputs: Sequence[ir.Value],
        attributes: dict[str, Any] | None = None,
        *,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """One node with one output, which is returned."""
        return self.add_many(op_type, label, inputs, 1, attributes, dtype=dtype)[0]

    def add_many(
        self,
        op_type: str,
        label: str,
        inputs: Sequence[ir.Value],
        count: int,
        attributes: dict[str, Any] | None = None,
        *,
        dtype: ir.DataType | None = None,
    ) -> Sequence[ir.Value]:
        """One node with `count` outputs."""
        name = f"{self.prefix}/{label}"
        node = ir.node(op_type, inputs, attributes or {}, num_outputs=count, name=name, metadata_props=self._metadata)
        kind = inputs[0].type if dtype is None else ir.TensorType(dtype)
        for i, value in enumerate(node.outputs):
            value.name, value.type = (f"{name}/output" if count == 1 else f"{name}/output_{i}"), kind
        self.model.graph.insert_before(self.anchor, node)
        return node.outputs
