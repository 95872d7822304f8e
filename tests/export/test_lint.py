"""Polygraphy's linter over stand-ins of the exported graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tests.export.graphs import float_value, make_model, norm_model, save, weight

from bridgeport.errors import ExportError
from bridgeport.export.lint import lint_graphs, write_stand_in


def two_layers(width: int = 128) -> ir.Model:
    """Two MatMuls with two different weights of one shape."""
    x = float_value("x", "batch", width)
    random = np.random.default_rng(0)
    nodes: list[ir.Node] = []
    last = x
    for name in ("first", "second"):
        node = ir.node(
            "MatMul", [last, weight(f"{name}.w", random.normal(size=(width, width)).astype(np.float32))], name=name
        )
        last = node.outputs[0]
        last.name, last.type, last.shape = f"{name}_out", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", width])
        nodes.append(node)
    return make_model([x], [last], nodes)


def test_a_stand_in_has_every_node_and_one_weight_of_each_shape(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    ir.save(two_layers(), path, external_data="model.onnx.data")
    out = tmp_path / "stand_in.onnx"
    write_stand_in(path, out)
    model = ir.load(out)
    assert [node.name for node in model.graph] == ["first", "second"]
    assert list(model.graph.initializers) == ["first.w"]
    assert out.stat().st_size < 1.2 * 128 * 128 * 4


def test_clean_graphs_and_a_faulty_one(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    good = tmp_path / "good.onnx"
    ir.save(norm_model(), good)
    assert lint_graphs({"encoder": good}, tmp_path / "scratch") == {"encoder": "clean"}

    faulty = norm_model()
    unused = ir.node("Relu", [faulty.graph.inputs[0]], name="unused")
    unused.outputs[0].name = "nobody_reads_this"
    faulty.graph.append(unused)
    with pytest.raises(ExportError, match=r"stage connector, check polygraphy_lint: \d findings, the first: .*unused"):
        lint_graphs({"encoder": good, "connector": save(faulty, tmp_path)}, tmp_path / "scratch")
