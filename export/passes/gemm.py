"""`Gemm` with a weight becomes `MatMul` and `Add`."""

from __future__ import annotations

import onnx_ir as ir

from .base import GraphPass
from .modules import SCOPES
from .weights import derived_initializer


class MatMulFromGemm(GraphPass):
    """`Gemm(x, W^T) + b` as `MatMul(x, W) + b`.

    Weight-only quantisation (MatMulNBits) starts from MatMul; in FP32 both run the same kernel.
    """

    name = "matmul-from-gemm"

    def requires(self, model: ir.Model) -> str | None:
        """There must be such a Gemm."""
        return None if any(_is_linear(node) for node in model.graph) else "no Gemm with a weight"

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """Rewrite each."""
        found = [node for node in model.graph if _is_linear(node)]
        for node in found:
            _rewrite(model, node)
        return model, bool(found)

    def ensures(self, model: ir.Model) -> str | None:
        """None is left."""
        left = [node.name for node in model.graph if _is_linear(node)]
        return f"Gemm is left at {left[:3]}" if left else None


def _is_linear(node: ir.Node) -> bool:
    if node.op_type != "Gemm" or node.domain != "" or node.attributes.get_int("transA"):
        return False
    weight = node.inputs[1]
    plain = node.attributes.get_float("alpha", 1.0) == 1.0 and node.attributes.get_float("beta", 1.0) == 1.0
    return plain and weight is not None and weight.const_value is not None


def _rewrite(model: ir.Model, node: ir.Node) -> None:
    x, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    assert weight is not None
    if node.attributes.get_int("transB", 0):
        assert weight.const_value is not None
        rows, columns = weight.const_value.shape.numpy()
        stored = derived_initializer(
            model, f"{weight.name}.transposed", weight.const_value, lambda array: array.T, [columns, rows]
        )
    else:
        stored = weight
    product = ir.node("MatMul", [x, stored], name=f"{node.name}/MatMul")
    nodes = [product]
    if bias is not None:
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"{node.name}/Add"))
    old = node.outputs[0]
    for new in nodes:
        new.outputs[0].name = f"{new.name}/output"
        new.outputs[0].type, new.outputs[0].shape = old.type, old.shape
        if SCOPES in node.metadata_props:
            new.metadata_props[SCOPES] = node.metadata_props[SCOPES]
    model.graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(old, nodes[-1].outputs[0], replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    if stored is not weight and not weight.uses():
        del model.graph.initializers[weight.name or ""]
