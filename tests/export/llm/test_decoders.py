"""Decoders of random language models, from every builder, against transformers on the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tests.checkpoints import write_blip2_checkpoint

from bridgeport.errors import ExportError, UnsupportedError
from bridgeport.export.llm import export_llm
from bridgeport.export.llm.check import check_decoder, make_ragged_batches
from bridgeport.export.llm.dequantize import dequantize, linear_names
from bridgeport.export.llm.export import decoder_shapes
from bridgeport.export.llm.genai import BLOCK_SIZE
from bridgeport.export.passes.axes import dims
from bridgeport.models import VisionLanguageModel, load_checkpoint

GENAI, EXPORTERS = "onnxruntime-genai", "transformers.exporters"


@dataclass(frozen=True)
class Case:
    """A text model, and who must build its decoder."""

    builder: str
    precision: str = "fp32"
    options: dict[str, Any] = field(default_factory=dict)
    rope: dict[str, Any] | None = None


CASES = {
    "llama-head16": Case(GENAI),
    "llama-head32-gqa-tied": Case(
        GENAI, options={"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "tie": True, "seed": 2}
    ),
    "llama-head64-mqa": Case(GENAI, options={"num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "seed": 3}),
    "llama-head80": Case(GENAI, options={"num_heads": 3, "head_dim": 80, "hidden_size": 48, "seed": 4}),
    "llama3-rope": Case(
        GENAI,
        rope={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "linear-rope": Case(EXPORTERS, rope={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama-head24-gqa": Case(EXPORTERS, options={"num_kv_heads": 2, "head_dim": 24, "seed": 5}),
    "llama-int4-gqa": Case(GENAI, "int4", {"num_kv_heads": 2, "seed": 6}),
    "opt-tied": Case(EXPORTERS, options={"text": "opt", "seed": 7}),
    "opt-untied-int4": Case(
        EXPORTERS, "int4", {"text": "opt", "tie": False, "num_heads": 2, "num_layers": 3, "seed": 8}
    ),
}


FP32 = [name for name, case in CASES.items() if case.precision == "fp32"]
INT4 = [name for name, case in CASES.items() if case.precision == "int4"]


@dataclass(frozen=True)
class Exported:
    """A case that was exported once for all tests of this file."""

    case: Case
    model: VisionLanguageModel
    path: Path
    builder: str
    opset: int


@pytest.fixture(scope="module")
def export_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The case of a name, exported once."""
    done: dict[str, Exported] = {}

    def export(name: str) -> Exported:
        if name not in done:
            done[name] = _export(CASES[name], tmp_path_factory.mktemp(name))
        return done[name]

    return export


def _export(case: Case, directory: Path) -> Exported:
    small = {"vision_layers": 1, "qformer_layers": 1, "processor": False}
    checkpoint = write_blip2_checkpoint(directory / "checkpoint", **(small | case.options))
    if case.rope is not None:
        set_rope(checkpoint, case.rope)
    model = load_checkpoint(checkpoint)
    path = directory / "llm" / "decoder.onnx"
    graph = export_llm(model, model.contracts["llm"], path, precision=case.precision)
    return Exported(case, model, path, graph.builder, graph.opset)


def set_rope(checkpoint: Path, rope: dict[str, Any]) -> None:
    """Other rotary embeddings for the same weights."""
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["rope_parameters"] = rope
    file.write_text(json.dumps(config))


def cache_of(exported: Exported) -> Any:
    assert exported.model.kv_cache is not None
    return exported.model.kv_cache


@pytest.mark.parametrize("name", CASES)
def test_the_preferred_builder_made_it(export_case: Callable[[str], Exported], name: str) -> None:
    exported = export_case(name)
    assert exported.builder == exported.case.builder


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_at_ragged_batches(export_case: Callable[[str], Exported], name: str) -> None:
    exported = export_case(name)
    decoder = exported.path if exported.case.precision == "int4" else None
    batches = make_ragged_batches(exported.model.load_stage("llm"), 128, decoder=decoder)
    assert [len(set(batch.lengths)) > 1 for batch in batches] == [False, True, True]
    found = check_decoder(exported.path, batches, cache_of(exported), precision=exported.case.precision)
    assert found["batch_sizes"] == [1, 3, 5]
    assert found["max_abs"] < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_inputs_and_outputs_are_the_contracts(export_case: Callable[[str], Exported], name: str) -> None:
    exported = export_case(name)
    model = ir.load(exported.path)
    ends = {value.name: dims(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    assert ends == decoder_shapes(exported.model.contracts["llm"], cache_of(exported))
    assert model.graph.opset_imports[""] == exported.opset


@pytest.mark.parametrize("name", CASES)
def test_only_graph_and_weights_are_left(export_case: Callable[[str], Exported], name: str) -> None:
    exported = export_case(name)
    assert sorted(file.name for file in exported.path.parent.iterdir()) == ["decoder.onnx", "decoder.onnx.data"]
    assert b"/site-packages/" not in exported.path.read_bytes()


@pytest.mark.parametrize("name", INT4)
def test_int4_quantises_every_projection(export_case: Callable[[str], Exported], name: str) -> None:
    exported = export_case(name)
    nodes = list(ir.load(exported.path).graph)
    quantised = [node for node in nodes if node.op_type == "MatMulNBits"]
    names = {name for node in quantised for name in linear_names(node)}
    modules = dict(exported.model.load_stage("llm").named_modules())
    assert names == {name for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    assert not any(node.op_type == "MatMul" for node in nodes)


@pytest.mark.parametrize("name", INT4)
def test_int4_weights_are_within_a_step(export_case: Callable[[str], Exported], name: str) -> None:
    exported = export_case(name)
    modules = dict(exported.model.load_stage("llm").named_modules())
    node = next(n for n in ir.load(exported.path).graph if n.op_type == "MatMulNBits" and len(linear_names(n)) == 1)
    linear = modules[linear_names(node)[0]]
    assert isinstance(linear, torch.nn.Linear)
    weight = linear.weight.numpy()
    # 4 bits, symmetric, in blocks: a step is at most the block's largest value / 7. The quantizer uses all 16
    # codes, so the value opposite the largest may be cut by one step.
    steps = np.abs(weight.reshape(-1, BLOCK_SIZE)).max(axis=1) / 7
    error = np.abs(dequantize(node) - weight).reshape(-1, BLOCK_SIZE).max(axis=1)
    assert np.all(error <= 1.01 * steps)
    assert np.median(error / steps) < 0.6


@pytest.mark.parametrize("name", FP32)
def test_a_changed_weight_is_found(export_case: Callable[[str], Exported], name: str, tmp_path: Path) -> None:
    exported = export_case(name)
    model = ir.load(exported.path)
    weight = next(node.inputs[1] for node in model.graph if node.op_type == "MatMul")
    assert weight is not None
    assert weight.const_value is not None
    changed = weight.const_value.numpy().copy()
    changed[0] += 0.01
    weight.const_value = ir.Tensor(changed, name=weight.name)
    ir.save(model, tmp_path / "decoder.onnx", external_data="decoder.onnx.data")
    batches = make_ragged_batches(exported.model.load_stage("llm"), 128)
    with pytest.raises(ExportError, match="stage llm, check onnxruntime: logits of"):
        check_decoder(tmp_path / "decoder.onnx", batches, cache_of(exported), precision="fp32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 20}, "head size 20: rotary embedding .* multiples of 16; .* head size 20: .* multiples of 8"),
        ({"text": "opt", "hidden_size": 36, "num_heads": 3}, "head size 12: GroupQueryAttention takes multiples of 8"),
    ],
)
def test_a_head_size_that_no_builder_takes_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = load_checkpoint(write_blip2_checkpoint(tmp_path / "checkpoint", processor=False, **options))
    with pytest.raises(UnsupportedError, match=message):
        export_llm(model, model.contracts["llm"], tmp_path / "llm" / "decoder.onnx", precision="fp32")
    assert not (tmp_path / "llm").exists()


def test_rotary_embeddings_that_depend_on_the_length_are_refused(tmp_path: Path) -> None:
    checkpoint = write_blip2_checkpoint(tmp_path / "checkpoint", processor=False)
    set_rope(checkpoint, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})
    model = load_checkpoint(checkpoint)
    with pytest.raises(
        UnsupportedError, match=r"rope_type 'dynamic'; it computes .*rope_type 'dynamic'; a trace holds"
    ):
        export_llm(model, model.contracts["llm"], tmp_path / "llm" / "decoder.onnx", precision="fp32")
