"""Tracing one stage: axes stay dynamic, weights go to the disk as they must, and memory comes back."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tests.export.graphs import WIDTH, contract
from torch import nn

from bridgeport.errors import ExportError
from bridgeport.export.checks import check_structure
from bridgeport.export.graph import OPSET, trace_and_save
from bridgeport.export.memory import release_memory


class _Stage(nn.Module):
    """A LayerNorm and a wide Linear, large enough to be stored outside the protobuf."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 512)
        self.down = nn.Linear(512, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.up(self.norm(x)).relu())
        return y


class _Baked(nn.Module):
    """Takes the batch as a Python number, which a trace holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(int(x.shape[0]), 1)


class _DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_a_stage_is_traced_with_its_axes_and_weights_outside(tmp_path: Path) -> None:
    stage = _Stage().eval().requires_grad_(False)
    trace_and_save(stage, contract(), tmp_path / "model.onnx")
    model = ir.load(tmp_path / "model.onnx")
    assert model.graph.opset_imports == {"": OPSET}
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "Gemm", "Relu", "Gemm"]
    outside = {
        name for name, value in model.graph.initializers.items() if isinstance(value.const_value, ir.ExternalTensor)
    }
    assert outside == {"up.weight", "up.bias", "down.weight"}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        x = np.random.default_rng(batch).normal(size=(batch, WIDTH)).astype(np.float32)
        expected = stage(torch.from_numpy(x)).numpy()
        # Sums of 512 products in FP32 in another order; values of about 0.3.
        np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-5, atol=1e-6)


def test_a_batch_that_torch_bakes_without_a_word_is_found(tmp_path: Path) -> None:
    path, kept = tmp_path / "model.onnx", contract()
    trace_and_save(_Baked().eval(), kept, path)
    shapes = {spec.name: spec.shape for spec in (*kept.inputs, *kept.outputs)}
    with pytest.raises(ExportError, match=r"check axes: x is \[2, 4\], the contract has \['batch', 4\]"):
        check_structure(path, shapes, stage="encoder", opset=OPSET, layer_norms=0, standard=True)


def test_a_module_that_cannot_be_traced_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"stage encoder: torch\.onnx cannot trace it .* must keep the axes"):
        trace_and_save(_DataDependent().eval(), contract(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_the_weights_of_an_exported_stage_leave_memory(tmp_path: Path) -> None:
    stage = _Stage().eval().requires_grad_(False)
    alive = [weakref.ref(parameter) for parameter in stage.parameters()]
    trace_and_save(stage, contract(), tmp_path / "model.onnx")
    del stage
    release_memory()
    assert [reference() for reference in alive] == [None] * 6
