"""Preflight of graphs that other exporters wrote: what is known to be in them is found, and nothing else is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from bridgeport.export.preflight import Finding, check_graph
from bridgeport.runtime.tensorrt.versions import Version

pytestmark = pytest.mark.slow


def check(path: Path, version: str) -> list[Finding]:
    return check_graph(path, None, Version.parse(version), stage="foreign")


def serious(found: list[Finding]) -> set[tuple[str, str]]:
    return {(one.check, one.severity) for one in found if one.severity != "note"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A tiny Llama without cache by `transformers.exporters`; opset -> file."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    from bridgeport.export.quiet import quiet_exporters

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model: Any = LlamaForCausalLM(config)
    model.eval()
    ids = torch.ones(2, 5, dtype=torch.int64)
    auto = torch.export.Dim.AUTO
    axes = {"input_ids": {0: auto, 1: auto}, "attention_mask": {0: auto, 1: auto}}
    folder = tmp_path_factory.mktemp("llama")
    exporter: Any = OnnxExporter
    for opset in (20, 23):
        options = OnnxConfig(opset_version=opset, optimize=True, dynamic_shapes=axes)
        with quiet_exporters(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = exporter().export_program(model, {"input_ids": ids, "attention_mask": ids}, options)[0]
        ir.save(graph, folder / f"{opset}.onnx")
    return {opset: folder / f"{opset}.onnx" for opset in (20, 23)}


def test_transformers_exporter(llama: dict[int, Path]) -> None:
    """Opset 20: the mask of the smallest float. Opset 23: three operators that 10.3 has not, and 11.4 has."""
    assert serious(check(llama[20], "10.3")) == {("mask", "warning")}
    old = check(llama[23], "10.3")
    assert serious(old) == {("opset", "error"), ("operator", "error"), ("mask", "warning")}
    named = {one.why.split()[0] for one in old if one.check == "operator"}
    assert named == {"Attention", "RMSNormalization", "RotaryEmbedding"}
    assert serious(check(llama[23], "11.4")) == {("mask", "warning"), ("fused-attention", "warning")}


def test_torchscript_exporter(tmp_path: Path) -> None:
    """Attention guarded against NaN under a mask of -inf; in FP16 operators of two types, which no engine takes."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert: Any = BertModel(config, add_pooling_layer=False)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.ones(2, 7, dtype=torch.int64)
    found = {}
    for precision in ("float32", "float16"):
        torch.manual_seed(0)
        model = Encoder().eval().to(getattr(torch, precision))
        path = tmp_path / f"{precision}.onnx"
        names = ["input_ids", "attention_mask"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (ids, ids),
                str(path),
                dynamo=False,
                opset_version=17,
                input_names=names,
                output_names=["y"],
                dynamic_axes={name: {0: "batch", 1: "length"} for name in (*names, "y")},
            )
        found[precision] = check(path, "10.3")
    assert serious(found["float32"]) == {("mask", "warning")}
    notes = [one.why for one in found["float32"] if one.check == "fused-attention"]
    assert any("Where between softmax" in why for why in notes)
    assert serious(found["float16"]) >= {("mixed-types", "error"), ("mask", "error"), ("fp16-norm", "error")}
