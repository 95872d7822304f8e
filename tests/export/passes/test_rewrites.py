"""Each rewrite on a small graph: the numbers stay, the structure is what the pass promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tests.export.graphs import float_value, make_model, run, weight

from bridgeport.errors import ExportError
from bridgeport.export.passes import apply_passes
from bridgeport.export.passes.axes import NameAxes, dims
from bridgeport.export.passes.gemm import MatMulFromGemm
from bridgeport.export.passes.lm_head import GatherLogitsPosition
from bridgeport.export.passes.modules import SCOPES, KeepModuleScopes
from bridgeport.export.passes.positions import PositionsFromMask
from bridgeport.export.passes.qkv import SplitFusedQkv
from bridgeport.export.passes.weights import TransposeWeights

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RANDOM.normal(size=shape).astype(np.float32)


def floats(node: ir.Node, name: str, *shape: int | str) -> ir.Value:
    """The node's output, named and shaped."""
    value = node.outputs[0]
    value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    return value


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def linear_model(*, gemm: bool) -> ir.Model:
    """`y = x @ W^T + b`, W stored `[out, in]` as in PyTorch."""
    x, w, b = float_value("x", "batch", 6), weight("w", normal(5, 6)), weight("b", normal(5))
    if gemm:
        nodes = [ir.node("Gemm", [x, w, b], {"transB": 1}, name="linear")]
    else:
        turned = ir.node("Transpose", [w], {"perm": [1, 0]}, name="turn")
        product = ir.node("MatMul", [x, turned.outputs[0]], name="product")
        nodes = [turned, product, ir.node("Add", [product.outputs[0], b], name="linear")]
    nodes[-1].metadata_props[SCOPES] = "['', 'fc', 'linear']"
    return make_model([x], [floats(nodes[-1], "y", "batch", 5)], nodes)


@pytest.mark.parametrize("gemm", [True, False])
def test_linear_layers_become_matmul_with_a_stored_transpose(gemm: bool) -> None:
    model, x = linear_model(gemm=gemm), normal(3, 6)
    before = run(model, {"x": x})[0]
    model, results = apply_passes(model, [TransposeWeights(), MatMulFromGemm()], stage="llm")
    assert op_types(model) == ["MatMul", "Add"]
    assert sorted(model.graph.initializers) == ["b", "w.transposed"]
    assert model.graph[-1].metadata_props[SCOPES] == "['', 'fc', 'linear']"
    assert [result.declined is None for result in results] == [True, gemm]
    # MatMul and Gemm sum the same products; 1e-6 is what another order of six of them costs.
    np.testing.assert_allclose(run(model, {"x": x})[0], before, rtol=1e-6, atol=1e-6)


def fused_qkv_model(*, bias: bool, heads: int = 2, size: int = 3) -> ir.Model:
    """One fused projection and what a traced attention makes of it: query, transposed key and value."""
    width = heads * size
    x, w = float_value("x", "batch", 4, width), weight("w", normal(width, 3 * width))
    nodes = [ir.node("MatMul", [x, w], name="qkv")]
    if bias:
        nodes.append(ir.node("Add", [weight("b", normal(3 * width)), nodes[-1].outputs[0]], name="bias"))
    shape = weight("shape", np.array([-1, 4, 3, heads, size], np.int64))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape], name="reshape"))
    nodes[-1].metadata_props[SCOPES] = "['', 'layer.self_attn', 'view']"
    nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [2, 0, 3, 1, 4]}, name="permute"))
    permuted, outputs = nodes[-1].outputs[0], []
    for i, name in enumerate(("q", "k", "v")):
        gather = ir.node("Gather", [permuted, weight(f"i{i}", np.array(i, np.int64))], {"axis": 0}, name=f"gather{i}")
        nodes.append(gather)
        last = gather
        if name == "k":
            last = ir.node("Transpose", [gather.outputs[0]], {"perm": [0, 1, 3, 2]}, name="turn")
            nodes.append(last)
        # An operation of its own behind each, as graph outputs may not be what the pass replaces.
        last = ir.node("Neg", [last.outputs[0]], name=name)
        nodes.append(last)
        outputs.append(floats(last, name, "batch", heads, size if name == "k" else 4, 4 if name == "k" else size))
    return make_model([x], outputs, nodes)


@pytest.mark.parametrize("bias", [True, False])
def test_fused_qkv_is_split_exactly(bias: bool) -> None:
    model, x = fused_qkv_model(bias=bias), normal(2, 4, 6)
    before = run(model, {"x": x})
    model, _ = apply_passes(model, [SplitFusedQkv()], stage="encoder")
    model.graph.sort()
    assert op_types(model).count("MatMul") == 3
    assert op_types(model).count("Gather") == 0
    # One Transpose for each of query, key and value: the key's two became one.
    assert op_types(model).count("Transpose") == 3
    assert "w" not in model.graph.initializers
    stacks = {node.metadata_props[SCOPES] for node in model.graph if node.op_type == "MatMul"}
    assert stacks == {f"['', 'layer.self_attn', '{part}_matmul']" for part in ("query", "key", "value")}
    for got, expected in zip(run(model, {"x": x}), before, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_split_declines_another_permutation() -> None:
    model = fused_qkv_model(bias=True)
    node = next(node for node in model.graph if node.name == "permute")
    node.attributes.add(ir.AttrInt64s("perm", [0, 2, 3, 1, 4]))
    _, results = apply_passes(model, [SplitFusedQkv()], stage="encoder")
    assert results[0].declined == "no fused query/key/value projection"


def head_model() -> ir.Model:
    hidden = float_value("hidden", "batch", "sequence", 6)
    head = ir.node("MatMul", [hidden, weight("w", normal(6, 9))], name="head")
    return make_model([hidden], [floats(head, "logits", "batch", "sequence", 9)], [head])


def test_the_head_runs_on_one_position_of_each_row() -> None:
    model, hidden = head_model(), normal(3, 5, 6)
    everywhere = run(model, {"hidden": hidden})[0]
    model, _ = apply_passes(model, [GatherLogitsPosition()], stage="llm")
    position = np.array([4, 0, 2], np.int64)
    got = run(model, {"hidden": hidden, "logits_position": position})[0]
    assert got.shape == (3, 9)
    np.testing.assert_allclose(got, everywhere[np.arange(3), position], rtol=1e-6, atol=1e-6)


def test_the_head_is_not_gathered_twice() -> None:
    model, _ = apply_passes(head_model(), [GatherLogitsPosition()], stage="llm")
    with pytest.raises(ExportError, match="has an input logits_position already"):
        apply_passes(model, [GatherLogitsPosition()], stage="llm")


def positions_model() -> ir.Model:
    embeds = float_value("inputs_embeds", "batch", "sequence", 2)
    mask, positions = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", axis]))
        for name, axis in (("attention_mask", "total"), ("position_ids", "sequence"))
    )
    node = ir.node("Identity", [positions], name="read")
    node.outputs[0].name, node.outputs[0].type = "out", ir.TensorType(ir.DataType.INT64)
    node.outputs[0].shape = ir.Shape(["batch", "sequence"])
    return make_model([embeds, mask, positions], [node.outputs[0]], [node])


@pytest.mark.parametrize(
    ("mask", "tokens", "expected"),
    [
        # A prefill counts every row from 0, whatever the padding on the right.
        ([[1, 1, 1, 1], [1, 1, 0, 0]], 4, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        # One token a row, the mask as wide as the longest row and as wide as a buffer.
        ([[1, 1, 1, 1], [1, 1, 0, 0]], 1, [[3], [1]]),
        ([[1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]], 1, [[3], [0]]),
        # A prompt of one token.
        ([[1], [1]], 1, [[0], [0]]),
        # Beyond the table: cut to its last row.
        ([[1] * 12], 12, [[0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7]]),
    ],
)
def test_positions_come_from_the_mask(mask: list[list[int]], tokens: int, expected: list[list[int]]) -> None:
    model, _ = apply_passes(positions_model(), [PositionsFromMask(8)], stage="llm")
    embeds = np.zeros((len(mask), tokens, 2), np.float32)
    got = run(model, {"inputs_embeds": embeds, "attention_mask": np.array(mask, np.int64)})[0]
    assert got.tolist() == expected


def test_axes_get_the_contracts_names_inside_too() -> None:
    model = head_model()
    shapes: dict[str, tuple[int | str, ...]] = {"hidden": ("rows", "tokens", 6), "logits": ("rows", "tokens", 9)}
    inner = ir.node("Relu", [model.graph.inputs[0]], name="inner")
    floats(inner, "inner", "batch", "sequence", 6)
    model.graph.append(inner)
    model, _ = apply_passes(model, [NameAxes(shapes)], stage="llm")
    assert {value.name: dims(value) for value in model.graph.outputs} == {"logits": ("rows", "tokens", 9)}
    assert dims(inner.outputs[0]) == ("rows", "tokens", 6)


def test_a_baked_axis_is_not_named_over() -> None:
    model = head_model()
    model.graph.inputs[0].shape = ir.Shape([2, "sequence", 6])
    with pytest.raises(ExportError, match=r"pass name-axes left a wrong graph: hidden is \[2, 'tokens', 6\]"):
        apply_passes(model, [NameAxes({"hidden": ("rows", "tokens", 6), "logits": ("rows", "tokens", 9)})], stage="llm")


def test_notes_of_the_exporting_machine_are_dropped() -> None:
    model = linear_model(gemm=True)
    node = model.graph[0]
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "File /somewhere/model.py, line 1"
    node.outputs[0].metadata_props["note"] = "x"
    model.metadata_props["note"] = "x"
    model, _ = apply_passes(model, [KeepModuleScopes()], stage="encoder")
    assert dict(node.metadata_props) == {SCOPES: "['', 'fc', 'linear']"}
    assert not node.outputs[0].metadata_props
    assert not model.metadata_props
