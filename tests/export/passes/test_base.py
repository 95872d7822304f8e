"""How a list of passes is applied."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from tests.export.graphs import norm_model

from bridgeport.errors import ExportError
from bridgeport.export.passes import GraphPass, PassResult, apply_passes


class _Rename(GraphPass):
    name = "rename"

    def __init__(self, *, declines: str | None = None, breaks: str | None = None, mandatory: bool = False) -> None:
        self.declines = declines
        self.breaks = breaks
        self.mandatory = mandatory  # type: ignore[misc]

    def requires(self, model: ir.Model) -> str | None:
        return self.declines

    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        model.graph.name = "renamed"
        return model, True

    def ensures(self, model: ir.Model) -> str | None:
        return self.breaks


def test_a_pass_runs_and_tells() -> None:
    model, results = apply_passes(norm_model(), [_Rename()], stage="encoder")
    assert model.graph.name == "renamed"
    assert results == (PassResult("rename", changed=True),)
    assert results[0].as_text() == "changed"


def test_a_pass_that_declines_changes_nothing_and_says_why() -> None:
    model, results = apply_passes(norm_model(), [_Rename(declines="no such node")], stage="encoder")
    assert model.graph.name == "test"
    assert results[0].as_text() == "declined: no such node"


def test_a_mandatory_pass_may_not_decline() -> None:
    with pytest.raises(ExportError, match="stage llm: pass rename cannot run: no such node"):
        apply_passes(norm_model(), [_Rename(declines="no such node", mandatory=True)], stage="llm")


def test_a_broken_promise_is_an_error() -> None:
    with pytest.raises(ExportError, match="stage llm: pass rename left a wrong graph: two nodes are left"):
        apply_passes(norm_model(), [_Rename(breaks="two nodes are left")], stage="llm")
