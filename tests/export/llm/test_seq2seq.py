"""T5's two graphs: equal to transformers on the same weights, and the check notices when they are not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tests.checkpoints_t5 import T5_CONFIGS, ExportedT5, export_t5, exported_t5, write_blip2_t5_checkpoint
from transformers import Blip2ForConditionalGeneration

from bridgeport.errors import CheckpointError, ExportError
from bridgeport.export.llm.seq2seq import dequantize_into_t5
from bridgeport.export.llm.seq2seq_check import (
    Batches,
    Seq2SeqRow,
    check_llm_decoder,
    check_llm_encoder,
    make_seq2seq_batches,
)
from bridgeport.models import t5

FAST = "odd"
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in T5_CONFIGS if name != FAST]


def make_batches(exported: ExportedT5) -> Batches:
    stages = exported.stages
    return make_seq2seq_batches(stages["embed_tokens"], stages["llm_encoder"], stages["llm"], exported.text)


def check_both(exported: ExportedT5, batches: Batches, *, precision: str = "fp32") -> list[dict[str, Any]]:
    cross = exported.seq2seq.cross_cache
    return [
        check_llm_encoder(exported.encoder, batches, cross, precision=precision),
        check_llm_decoder(exported.decoder, batches, exported.kv_cache, cross, precision=precision),
    ]


@pytest.mark.parametrize("name", [FAST, *SLOW])
def test_graphs_equal_transformers(name: str) -> None:
    exported = exported_t5(name)
    found = check_both(exported, make_batches(exported))
    assert [one["batch_sizes"] for one in found] == [[1, 3, 5]] * 2
    # The check has limits of its own; these say what it is on an FP32 graph (measured 1e-6 to 1e-5).
    assert max(one["max_abs"] for one in found) < 1e-4


def test_reference_is_the_checkpoint_in_transformers() -> None:
    exported = exported_t5(FAST)
    row = make_batches(exported)[0][0]
    model: Any = Blip2ForConditionalGeneration.from_pretrained(exported.path)
    # Here SDPA computes what is written out there; another weight or position moves the logits by more than 0.1.
    np.testing.assert_allclose(row.logits, run_transformers(model, row), atol=2e-5, rtol=1e-5)


def run_transformers(model: Any, row: Seq2SeqRow) -> NDArray[np.float32]:
    """Logits `[1 + STEPS, V]` of the T5 in transformers' BLIP-2."""
    with torch.inference_mode():
        output = model.eval().language_model(
            inputs_embeds=torch.from_numpy(row.inputs_embeds)[None],
            decoder_inputs_embeds=torch.from_numpy(row.decoder_embeds)[None],
        )
    logits: NDArray[np.float32] = output.logits[0, row.length - 1 :].numpy()
    return logits


def test_encoder_has_standard_operators_only() -> None:
    exported = exported_t5(FAST)
    assert {node.domain for node in ir.load(exported.encoder).graph} == {""}


def test_decoder_writes_its_cache_in_place_and_copies_no_prompt() -> None:
    exported = exported_t5(FAST)
    model = ir.load(exported.decoder)
    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert len(attentions) == exported.text.num_decoder_layers
    assert not [node for node in model.graph if node.op_type in ("ScatterND", "Scatter", "ScatterElements")]
    cross = {value for value in model.graph.inputs if (value.name or "").startswith("cross_key_values")}
    readers = {node.op_type for value in cross for node, _ in value.uses()}
    # A key's transpose goes into the product when ONNX Runtime loads the graph; Shape reads no number.
    assert readers <= {"MatMul", "Transpose", "Shape"}


def test_stored_head_is_kept_and_a_missing_one_is_the_embedding(tmp_path: Path) -> None:
    path = write_blip2_t5_checkpoint(tmp_path, **T5_CONFIGS[FAST])
    stages = exported_t5(FAST).stages
    assert not torch.equal(stages["llm"].lm_head.weight, stages["embed_tokens"].weight)
    state = load_file(path / "model.safetensors")
    del state["language_model.lm_head.weight"]
    save_file(state, path / "tied.safetensors", metadata={"format": "pt"})
    weights = t5_weights(path / "tied.safetensors")
    decoder: Any = exported_t5(FAST).layout.load("llm", weights)
    assert torch.equal(decoder.lm_head.weight, stages["embed_tokens"].weight)


def t5_weights(file: Path) -> Any:
    from bridgeport.models.weights import open_weights

    directory = file.parent / "tied"
    directory.mkdir()
    file.rename(directory / "model.safetensors")
    return open_weights(directory)


@pytest.mark.parametrize("start", [None, -1, 10_000])
def test_decoder_needs_a_start_token(start: int | None) -> None:
    text = type("Text", (), {"decoder_start_token_id": start, "vocab_size": 100, "pad_token_id": 0})()
    with pytest.raises(CheckpointError, match="decoder_start_token_id"):
        t5.t5_seq2seq(text)


def _shift_distances(graph: ir.Graph) -> None:
    """The bias of one distance more: the table is `[distances, heads]`."""
    table = next(node for node in graph if node.op_type == "Gather" and _is_table(node.inputs[0])).inputs[0]
    assert table is not None
    assert table.const_value is not None
    table.const_value = ir.Tensor(np.roll(table.const_value.numpy(), 1, axis=0), name=table.name)


def _is_table(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT


def _scale_scores(graph: ir.Graph) -> None:
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 0.5)


def _drop_padding(graph: ir.Graph) -> None:
    """Padding is masked by nothing, as if every row were as long as the longest."""
    for value in graph.initializers.values():
        if value.const_value is not None and value.const_value.size == 1:
            number = value.const_value.numpy()
            if number.dtype == np.float32 and float(number.reshape(())) == t5.MASKED:
                value.const_value = ir.Tensor(np.zeros_like(number), name=value.name)


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("llm_encoder", _shift_distances),
        ("llm_encoder", _drop_padding),
        ("llm", _shift_distances),
        ("llm", _scale_scores),
        ("llm", _drop_padding),
    ],
)
def test_check_notices(stage: str, fault: Callable[[ir.Graph], None], tmp_path: Path) -> None:
    exported = exported_t5(FAST)
    model = ir.load(exported.encoder if stage == "llm_encoder" else exported.decoder)
    fault(model.graph)
    ir.save(model, tmp_path / "faulty.onnx", external_data="faulty.data")
    cross, batches = exported.seq2seq.cross_cache, make_batches(exported)
    if stage == "llm_encoder":
        check = partial(check_llm_encoder, tmp_path / "faulty.onnx", batches, cross)
    else:
        check = partial(check_llm_decoder, tmp_path / "faulty.onnx", batches, exported.kv_cache, cross)
    with pytest.raises(ExportError, match=f"stage {stage}, check onnxruntime.*differs from PyTorch"):
        check(precision="fp32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flan", "t5-tied"])
def test_int4_graphs_equal_their_own_weights(name: str, tmp_path: Path) -> None:
    checkpoint = write_blip2_t5_checkpoint(tmp_path / "checkpoint", **T5_CONFIGS[name])
    exported = export_t5(checkpoint, tmp_path, precision="int4")
    # Every Linear: four of self-attention, three of the feed-forward (two in T5), and k and v of the decoder's layers.
    linears = sum(node.op_type == "MatMulNBits" for node in ir.load(exported.encoder).graph)
    gated = 3 if exported.text.is_gated_act else 2
    assert linears == exported.text.num_layers * (4 + gated) + 2 * exported.text.num_decoder_layers
    stages = exported.stages
    batches = make_seq2seq_batches(
        stages["embed_tokens"],
        stages["llm_encoder"],
        stages["llm"],
        exported.text,
        quantized=(exported.encoder, exported.decoder),
    )
    found = check_both(exported, batches, precision="int4")
    assert max(one["max_abs"] for one in found) < 1e-4
    model: Any = Blip2ForConditionalGeneration.from_pretrained(checkpoint)
    before = run_transformers(model, batches[0][0])
    dequantize_into_t5(model.language_model, exported.encoder, exported.decoder)
    np.testing.assert_allclose(run_transformers(model, batches[0][0]), batches[0][0].logits, atol=2e-5, rtol=1e-5)
    assert np.abs(before - batches[0][0].logits).max() > 1e-2  # what 4 bits cost: the weights did change
