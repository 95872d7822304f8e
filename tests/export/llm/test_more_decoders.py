"""Decoders of the text models behind LLaVA, Idefics, SmolVLM, InternVL and Qwen-VL, against transformers' modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import transformers
from tests.checkpoints import randomize
from tests.checkpoints_qwen2_vl import write_qwen2_vl_checkpoint

from bridgeport.errors import ExportError, UnsupportedError
from bridgeport.export.llm import export_llm
from bridgeport.export.llm.check import STEPS, RaggedBatch, check_decoder, make_ragged_batches, step_inputs
from bridgeport.export.llm.export import decoder_shapes
from bridgeport.export.passes.axes import dims
from bridgeport.models import load_checkpoint
from bridgeport.models.contract import KvCacheContract, StageContract
from bridgeport.models.language import kv_cache, llm_contract
from bridgeport.runtime.torch import TorchLanguageModel

GENAI, EXPORTERS = "onnxruntime-genai", "transformers.exporters"
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class TextModel:
    """What the decoder's export asks of a checkpoint, for a text model alone."""

    llm: Any
    path: Path = Path("text-model")
    architecture: str = "text model"

    @property
    def text_config(self) -> Any:
        return self.llm.config

    @property
    def kv_cache(self) -> KvCacheContract:
        return kv_cache(self.llm.config)

    @property
    def contracts(self) -> dict[str, StageContract]:
        return {"llm": llm_contract(self.llm.config)}

    def load_stage(self, name: str) -> Any:
        return copy.deepcopy({"llm": self.llm}[name])


@dataclass(frozen=True)
class Case:
    """A text model (transformers' config class and what differs from SIZES), and who must build its decoder."""

    config: str
    builder: str
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    windows: tuple[int, ...] = (-1, -1)

    def make(self, directory: Path) -> Any:
        if self.config.startswith("qwen-vl-"):
            path = write_qwen2_vl_checkpoint(directory, self.config.removeprefix("qwen-vl-"), **self.options)  # type: ignore[arg-type]
            return load_checkpoint(path)
        config = getattr(transformers, self.config)(**SIZES | self.options)
        make: Any = transformers.AutoModelForCausalLM
        llm = make.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
        randomize(llm, 1)
        llm.tie_weights()
        return TextModel(llm)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


MISTRAL = {"sliding_window": None}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
CASES = {
    "mistral": Case("MistralConfig", GENAI, MISTRAL),
    "mistral-head32": Case("MistralConfig", GENAI, MISTRAL | {"head_dim": 32}),
    "mistral-head32-int4": Case("MistralConfig", GENAI, MISTRAL | {"head_dim": 32}, "int4"),
    "mistral-window-of-the-context": Case("MistralConfig", GENAI, {"sliding_window": 128}),
    "mistral-window": Case(
        "MistralConfig", EXPORTERS, {"sliding_window": 4, "hidden_size": 48, "head_dim": 16}, windows=(4, 4)
    ),
    "mistral-window-int4": Case("MistralConfig", EXPORTERS, {"sliding_window": 3}, "int4", (3, 3)),
    "mistral-llama3-rope": Case("MistralConfig", EXPORTERS, MISTRAL | {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": Case("Qwen2Config", GENAI),
    "qwen2-tied": Case("Qwen2Config", GENAI, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2-tied-int4": Case("Qwen2Config", GENAI, {"tie_word_embeddings": True}, "int4"),
    "qwen2-window-in-the-last-layer": Case("Qwen2Config", EXPORTERS, SLIDING, windows=(-1, 4)),
    "llama-gqa-tied-biases": Case(
        "LlamaConfig", GENAI, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    ),
    "gemma": Case("GemmaConfig", GENAI, {"head_dim": 32}),
    "phi": Case("PhiConfig", EXPORTERS, {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "phi3": Case("Phi3Config", EXPORTERS),
    "phi3-int4": Case("Phi3Config", EXPORTERS, precision="int4"),
    "qwen2-vl": Case("qwen-vl-2", EXPORTERS, {"tie": True}),
    "qwen2-vl-int4": Case("qwen-vl-2", EXPORTERS, {"text": {"hidden_size": 64, "num_attention_heads": 4}}, "int4"),
    "qwen2.5-vl": Case("qwen-vl-2.5", EXPORTERS),
}
# The others take minutes together: most trace a model.
FAST = ("mistral", "mistral-head32-int4", "qwen2-tied", "llama-gqa-tied-biases", "qwen2-vl")
EVERY = [name if name in FAST else slow(name) for name in CASES]
WINDOWS = [slow(name) for name, case in CASES.items() if max(case.windows) > 0]


@dataclass(frozen=True)
class Exported:
    """A case that was exported once for all tests of this file."""

    case: Case
    model: Any
    path: Path
    builder: str
    batches: list[RaggedBatch]


@pytest.fixture(scope="module")
def export_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The case of a name, exported once."""
    done: dict[str, Exported] = {}

    def export(name: str) -> Exported:
        if name not in done:
            case, directory = CASES[name], tmp_path_factory.mktemp(name)
            model, path = case.make(directory / "checkpoint"), directory / "llm" / "decoder.onnx"
            builder = export_llm(model, model.contracts["llm"], path, precision=case.precision).builder
            decoder = path if case.precision == "int4" else None
            batches = make_ragged_batches(model.load_stage("llm"), 128, decoder=decoder)
            done[name] = Exported(case, model, path, builder, batches)
        return done[name]

    return export


@pytest.mark.parametrize("name", EVERY)
def test_logits_equal_transformers_at_ragged_batches(export_case: Callable[[str], Exported], name: str) -> None:
    exported = export_case(name)
    assert exported.builder == exported.case.builder
    found = check_decoder(exported.path, exported.batches, exported.model.kv_cache, precision=exported.case.precision)
    assert found["batch_sizes"] == [1, 3, 5]
    assert found["max_abs"] < 1e-4


@pytest.mark.parametrize("name", EVERY)
def test_inputs_outputs_and_windows_are_the_models(export_case: Callable[[str], Exported], name: str) -> None:
    exported = export_case(name)
    graph = ir.load(exported.path).graph
    ends = {value.name: dims(value) for value in (*graph.inputs, *graph.outputs)}
    assert ends == decoder_shapes(exported.model.contracts["llm"], exported.model.kv_cache)
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    found = {node.inputs[3].name: node.attributes.get_int("local_window_size", -1) for node in attention}  # type: ignore[union-attr]
    cache = exported.model.kv_cache
    assert [found[cache.past.format(layer=i, kind="key")] for i in range(2)] == list(exported.case.windows)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_one_token_wider_is_found(export_case: Callable[[str], Exported], name: str, tmp_path: Path) -> None:
    exported = export_case(name)
    model = ir.load(exported.path)
    for node in model.graph:
        size = node.attributes.get_int("local_window_size", -1)
        if size > 0:
            node.attributes.add(ir.AttrInt64("local_window_size", size + 1))
    ir.save(model, tmp_path / "decoder.onnx", external_data="decoder.onnx.data")
    with pytest.raises(ExportError, match="logits of"):
        check_decoder(
            tmp_path / "decoder.onnx", exported.batches, exported.model.kv_cache, precision=exported.case.precision
        )


def test_positions_of_other_rows_are_found(export_case: Callable[[str], Exported]) -> None:
    """M-RoPE: the check gives every row positions of its own, on every axis, and each of them counts."""
    exported = export_case("qwen2-vl")
    batch = exported.batches[1]
    for axis in range(3):
        changed = tuple(row.copy() for row in batch.positions)
        changed[0][axis, -1] += 1
        wrong = RaggedBatch(batch.lengths, batch.embeds, batch.logits, changed)
        with pytest.raises(ExportError, match="logits of token 2 at batch 3 differs"):
            check_decoder(exported.path, [wrong], exported.model.kv_cache, precision="fp32")


@pytest.mark.parametrize("name", ["mistral", "mistral-window", "qwen2-window-in-the-last-layer", "qwen2.5-vl"])
def test_the_torch_engine_equals_transformers(tmp_path: Path, name: str) -> None:
    """The reference engine over the same cache buffers: windows count back over tokens, positions come in."""
    model = CASES[name].make(tmp_path)
    engine = TorchLanguageModel(model.contracts["llm"], model.load_stage("llm"), model.kv_cache)
    for batch in make_ragged_batches(model.load_stage("llm"), 128):
        cache = engine.allocate_cache(len(batch.lengths), max(batch.lengths) + STEPS)
        for step in range(1 + STEPS):
            inputs = {key: np.ascontiguousarray(array) for key, array in step_inputs(batch, step).items()}
            logits, expected = engine.run(inputs, cache=cache)["logits"], batch.logits[:, step]
            # One network in one library, but with padding: sums differ in the last bits.
            assert np.allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-5), f"{name} step {step}"
    changed = step_inputs(batch, STEPS) | {"logits_position": np.zeros(len(batch.lengths), np.int64)}
    changed["attention_mask"][0, max(0, batch.lengths[0] - 2)] = 0
    wrong = engine.run({key: np.ascontiguousarray(array) for key, array in changed.items()}, cache=cache)["logits"]
    assert np.abs(wrong - batch.logits[:, STEPS])[0].max() > 1e-2


def test_unknown_attention_and_text_models_are_refused(tmp_path: Path) -> None:
    model: Any = Case("Qwen2Config", EXPORTERS).make(tmp_path)
    model.llm.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UnsupportedError, match="layer type 'chunked_attention'; built are full_attention, sliding"):
        export_llm(model, model.contracts["llm"], tmp_path / "decoder.onnx", precision="fp32")
    model.llm.config.model_type = "mamba"
    with pytest.raises(UnsupportedError, match="text model 'mamba' has no decoder builder; accepted are gemma, llama"):
        export_llm(model, model.contracts["llm"], tmp_path / "decoder.onnx", precision="fp32")
    assert not (tmp_path / "decoder.onnx").exists()
