"""Every check of an exported graph, each with a graph that only it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tests.export.graphs import WIDTH, contract, float_value, make_model, norm_model, save
from torch import nn

from bridgeport.errors import ExportError
from bridgeport.export.checks import (
    BATCH_SIZES,
    Reference,
    check_equality,
    check_sizes,
    check_structure,
    compare,
    make_references,
)
from bridgeport.export.passes.axes import Dims

SHAPES: dict[str, Dims] = {"x": ("batch", WIDTH), "y": ("batch", WIDTH)}


def check(model: ir.Model, directory: Path, shapes: dict[str, Dims] = SHAPES, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"stage": "encoder", "opset": 20, "layer_norms": 1, "standard": True}
    return check_structure(save(model, directory), shapes, **(options | changes))


def test_a_good_graph_passes(tmp_path: Path) -> None:
    found = check(norm_model(), tmp_path)
    assert found == {
        "axes": ["batch"],
        "opset": 20,
        "largest_constant": 1.0,
        "operators": {"LayerNormalization": 1},
        "onnx_checker": "clean",
        "layer_normalization": 1,
    }


def test_a_baked_axis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"check axes: x is \[2, 4\], the contract has \['batch', 4\]"):
        check(norm_model(batch=2), tmp_path)


def test_axes_with_different_symbols_are_refused(tmp_path: Path) -> None:
    model = norm_model()
    model.graph.outputs[0].shape = ir.Shape(["s45", WIDTH])
    with pytest.raises(ExportError, match=r"check axes: y is \['s45', 4\]"):
        check(model, tmp_path)


def test_missing_and_unknown_ends_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="check axes: mask is missing"):
        check(norm_model(), tmp_path, {**SHAPES, "mask": ("batch",)})
    with pytest.raises(ExportError, match=r"check axes: \['y'\] are not in the contract"):
        check(norm_model(), tmp_path, {"x": SHAPES["x"]})


def test_another_opset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="check opset: the graph has 21, 20 is wanted"):
        check(norm_model(21), tmp_path)


@pytest.mark.parametrize("value", [65505.0, -1e30, float("inf"), float("-inf"), float("nan")])
def test_a_constant_beyond_fp16_is_refused(tmp_path: Path, value: float) -> None:
    gain = np.ones(WIDTH, np.float32)
    gain[2] = value
    with pytest.raises(ExportError, match="check fp16 range: constant gain holds"):
        check(norm_model(scale=gain), tmp_path)


def test_the_largest_fp16_number_is_accepted(tmp_path: Path) -> None:
    gain = np.full(WIDTH, -65504.0, np.float32)
    assert check(norm_model(scale=gain), tmp_path)["largest_constant"] == 65504.0


def test_a_constant_inside_a_node_counts_too(tmp_path: Path) -> None:
    model = norm_model()
    big = ir.node("Constant", [], {"value_float": 1e9}, name="big")
    big.outputs[0].name = "big_out"
    model.graph.insert_before(model.graph[0], big)
    with pytest.raises(ExportError, match="check fp16 range: constant big holds 1e"):
        check(model, tmp_path)


def test_a_contributed_operator_is_refused(tmp_path: Path) -> None:
    x = float_value("x", "batch", WIDTH)
    node = ir.node("Gelu", [x], domain="com.microsoft", name="contrib")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", WIDTH])
    model = make_model([x], [y], [node], com_microsoft=1)
    with pytest.raises(ExportError, match=r"check operators: contrib is com\.microsoft\.Gelu"):
        check(model, tmp_path, layer_norms=None)
    assert "operators" not in check(model, tmp_path, layer_norms=None, standard=False)


def test_a_local_function_is_refused(tmp_path: Path) -> None:
    model = norm_model()
    a = ir.Value(name="a")
    double = ir.node("Add", [a, a], name="add")
    body = ir.Graph([a], [double.outputs[0]], nodes=[double], opset_imports={"": 20})
    function = ir.Function("local", "double", graph=body, attributes=[])
    model.functions[function.identifier()] = function
    with pytest.raises(ExportError, match="check operators: local functions are left"):
        check(model, tmp_path)


def test_a_layer_norm_taken_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="check layer_normalization: 1 LayerNormalization in the graph, the modules ran 2"
    ):
        check(norm_model(), tmp_path, layer_norms=2)


def test_the_onnx_checker_runs(tmp_path: Path) -> None:
    model = norm_model()
    model.graph[0].attributes.add(ir.AttrFloat32("axis", -1.0))
    with pytest.raises(ExportError, match=r"check onnx_checker: Mismatched attribute type in 'norm : axis'"):
        check(model, tmp_path)


def test_sizes_hold_batches_that_were_not_traced() -> None:
    assert [sizes["batch"] for sizes in check_sizes(contract())] == list(BATCH_SIZES) == [1, 3, 5]


class _Norms(nn.Module):
    """Two LayerNorms, one of them run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LayerNorm(WIDTH)
        self.second = nn.LayerNorm(WIDTH)
        self.never = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x))
        self.second(y)
        return y


def test_references_count_the_norms_that_run() -> None:
    references, norms = make_references(_Norms(), contract())
    assert norms == 2
    assert [reference.output.shape for reference in references] == [(1, WIDTH), (3, WIDTH), (5, WIDTH)]


def layer_norm_references(eps: float) -> list[Reference]:
    norm = nn.LayerNorm(WIDTH, eps=eps)
    return make_references(norm, contract())[0]


def test_equal_graphs_pass_and_a_changed_weight_does_not(tmp_path: Path) -> None:
    path = save(norm_model(), tmp_path)
    found = check_equality(path, layer_norm_references(1e-5), stage="encoder", output="y")
    assert found["batch_sizes"] == [1, 3, 5]
    assert found["max_abs"] < 1e-6
    gain = np.ones(WIDTH, np.float32)
    gain[1] = 1.001
    path = save(norm_model(scale=gain), tmp_path)
    with pytest.raises(ExportError, match=r"check onnxruntime: y at batch 1 differs from PyTorch by .* at \[0, 1\]"):
        check_equality(path, layer_norm_references(1e-5), stage="encoder", output="y")


def test_a_wrong_eps_is_seen(tmp_path: Path) -> None:
    path = save(norm_model(), tmp_path)
    with pytest.raises(ExportError, match="differs from PyTorch"):
        check_equality(path, layer_norm_references(1e-3), stage="encoder", output="y")


def test_comparison_refuses_nan_and_other_shapes() -> None:
    reference = Reference({"x": np.zeros((1, 2), np.float32)}, np.zeros((1, 2), np.float32))
    with pytest.raises(ExportError, match="differs from PyTorch by nan"):
        compare(np.array([[0.0, np.nan]], np.float32), reference, stage="encoder", output="y")
    with pytest.raises(ExportError, match=r"has shape \[2, 2\], PyTorch gives \[1, 2\]"):
        compare(np.zeros((2, 2), np.float32), reference, stage="encoder", output="y")
