"""Decoders of ONNX Runtime's operators and their standard form: the same logits, prompts padded and tokens after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from tests.export.graphs import float_value, make_model, run, weight
from tests.export.llm.test_more_decoders import CASES

from bridgeport.bundle import Bundle
from bridgeport.calibration.fp16 import ToFloat16
from bridgeport.calibration.rules import check_rules
from bridgeport.calibration.weight_only import quantize_weights
from bridgeport.errors import ExportError
from bridgeport.export.checks import open_session
from bridgeport.export.graph import save_graph
from bridgeport.export.llm import export_llm
from bridgeport.export.passes import apply_passes
from bridgeport.export.passes.axes import dims
from bridgeport.export.passes.gqa import CONTRIB
from bridgeport.export.passes.standard_decoder import (
    OPSET,
    LowerOpset,
    standard_decoder_passes,
    write_standard_decoder,
)
from bridgeport.export.passes.standard_decoder_norm import ExplicitRmsNorm
from bridgeport.models.contract import KvCacheContract

RANDOM = np.random.default_rng(0)
# Prompts of one batch, and how many tokens follow each.
LENGTHS, STEPS = (7, 2, 5), 4
# FP32 sums in another order: measured 1e-7 to 2e-6 of the largest logit. A mask or position that is off moves 1e-2.
OF_LARGEST = 2e-5


def normal(*shape: int) -> Any:
    return RANDOM.normal(size=shape).astype(np.float32)


@dataclass(frozen=True)
class Exported:
    """A decoder as a bundle has it, its standard form, and embeddings for LENGTHS and STEPS."""

    original: Path
    standard: Path
    cache: KvCacheContract
    rows: tuple[Any, ...]
    positions: Any = None
    # Of the prompts and of every step: what is read beside the tokens.
    more: tuple[dict[str, Any], dict[str, Any]] = field(default_factory=lambda: ({}, {}))


def exported(original: Path, standard: Path, cache: KvCacheContract, width: int, axes: int = 1) -> Exported:
    random = np.random.default_rng(1)
    rows = tuple(random.normal(size=(n + STEPS, width)).astype(np.float32) for n in LENGTHS)
    positions = random.integers(0, 20, (axes, len(LENGTHS), max(LENGTHS) + STEPS)) if axes > 1 else None
    return Exported(original, standard, cache, rows, positions)


def slots(cache: KvCacheContract) -> list[tuple[str, str]]:
    names = [(layer, kind) for layer in range(cache.num_layers) for kind in ("key", "value")]
    return [(cache.past.format(layer=i, kind=kind), cache.present.format(layer=i, kind=kind)) for i, kind in names]


def step_embeds(case: Exported, step: int) -> dict[str, Any]:
    """Inputs that both layouts take alike: prompts padded on the right, or one token of each row."""
    lengths, longest = np.array(LENGTHS), max(LENGTHS)
    start, end = (0, longest) if step == 0 else (longest + step - 1, longest + step)
    more = dict(case.more[step > 0])
    if case.positions is not None:
        more["position_ids"] = np.ascontiguousarray(case.positions[:, :, start:end])
    if step == 0:
        rows = [np.pad(row[:n], ((0, longest - n), (0, 0))) for row, n in zip(case.rows, LENGTHS, strict=True)]
        return {"inputs_embeds": np.stack(rows), "logits_position": lengths - 1, **more}
    rows = [row[n + step - 1 : n + step] for row, n in zip(case.rows, LENGTHS, strict=True)]
    return {"inputs_embeds": np.stack(rows), "logits_position": np.zeros_like(lengths), **more}


def run_original(path: Path, case: Exported) -> list[Any]:
    """Logits of the prompts and of each step, over one buffer that is written in place, as in the run time."""
    session, cache = open_session(path), case.cache
    shape = (len(LENGTHS), cache.num_heads, max(LENGTHS) + STEPS, cache.head_size)
    buffers = [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for _ in slots(cache)]
    results = []
    for step in range(1 + STEPS):
        mask = np.arange(max(LENGTHS) + step)[None] < np.array(LENGTHS)[:, None] + step
        binding = session.io_binding()
        for name, array in (step_embeds(case, step) | {"attention_mask": mask.astype(np.int64)}).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for (past, present), buffer in zip(slots(cache), buffers, strict=True):
            binding.bind_ortvalue_input(past, buffer)
            binding.bind_ortvalue_output(present, buffer)
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        results.append(binding.get_outputs()[-1].numpy())
    return results


def run_standard(path: Path, case: Exported) -> list[Any]:
    """The same over a cache that grows: it starts empty, and the mask leaves the padding out of it."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[session.get_inputs()[-2].type]
    empty = np.zeros((len(LENGTHS), case.cache.num_heads, 0, case.cache.head_size), dtype)
    cache = {past: empty for past, _ in slots(case.cache)}
    mask = (np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]).astype(np.int64)
    results = []
    for step in range(1 + STEPS):
        if step > 0:
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        feeds = {**step_embeds(case, step), "attention_mask": mask, **cache}
        found = dict(zip(names, session.run(names, feeds), strict=True))
        cache = {past: found[present] for past, present in slots(case.cache)}
        assert {array.shape[2] for array in cache.values()} == {mask.shape[1]}
        results.append(found["logits"])
    return results


def worst_cosine(found: list[Any], expected: list[Any]) -> float:
    pairs = [(a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)]
    return min(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs)


def standardize(original: Path, out: Path) -> Path:
    write_standard_decoder(original, out)
    return out


NAMES = [
    "llama-gqa-tied",  # keys and values shared by two heads, positions inside the operator
    "opt",  # positions added to the embeddings, LayerNorm, biases
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "mistral-head32",
            "qwen2-tied",
            "llama-gqa-tied-biases",
            "gemma",
            "mistral-window",
            "qwen2-window-in-the-last-layer",
            "phi",
            "phi3",
            "qwen2-vl",
        )
    ),
]


@pytest.fixture(scope="module")
def case_of(blip2_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The decoder of a name, exported and brought to its standard form once."""
    done: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in done:
            directory = tmp_path_factory.mktemp(name)
            if name in CASES:
                model = CASES[name].make(directory / "checkpoint")
                original, contract, cache = directory / "decoder.onnx", model.contracts["llm"], model.kv_cache
                export_llm(model, contract, original, precision="fp32")
            else:
                bundle = Bundle.load(blip2_bundle(name))
                original, contract = bundle.graph("llm"), bundle.manifest.stage("llm").contract
                assert bundle.manifest.kv_cache is not None
                cache = bundle.manifest.kv_cache
            axes = 3 if any(spec.name == "position_ids" for spec in contract.inputs) else 1
            width = int(contract.input("inputs_embeds").shape[2])
            standard = standardize(original, directory / "standard.onnx")
            done[name] = exported(original, standard, cache, width, axes)
        return done[name]

    return get


def check_logits(case: Exported, name: str) -> None:
    """Every step's logits of the standard decoder against the original's."""
    found, expected = run_standard(case.standard, case), run_original(case.original, case)
    largest = max(np.abs(one).max() for one in expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(one, other, rtol=0, atol=OF_LARGEST * largest, err_msg=f"{name}, step {step}")


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_original(case_of: Callable[[str], Exported], name: str) -> None:
    check_logits(case_of(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_operators_and_ends_are_standard(case_of: Callable[[str], Exported], name: str) -> None:
    case = case_of(name)
    onnx.checker.check_model(str(case.standard), full_check=True)
    model, before = ir.load(case.standard), ir.load(case.original)
    assert dict(model.graph.opset_imports) == {"": OPSET}
    assert all(node.domain == "" for node in model.graph)
    assert not check_rules(model, precision="fp32")
    assert [value.name for value in model.graph.inputs] == [value.name for value in before.graph.inputs]
    assert {value.name for value in model.graph.outputs} == {value.name for value in before.graph.outputs}
    ends = {value.name: dims(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for past, present in slots(case.cache):
        assert ends[past] == ("batch", case.cache.num_heads, "past_sequence", case.cache.head_size)
        assert ends[present] == ("batch", case.cache.num_heads, "total_sequence", case.cache.head_size)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy()
        assert array.dtype != np.float32 or np.abs(array).max() <= 65504, f"{value.name} is beyond FP16"


# Name of a constant -> what it becomes: a mask that lets padding through, positions one further, a wider window.
FAULTS: dict[str, Any] = {
    "decoder_mask/hidden": np.array(0, np.float32),
    "decoder_mask/one": np.array(2, np.int64),
    "decoder_mask/window_4/width": np.array(5, np.int64),
}


@pytest.mark.parametrize(
    ("name", "constant"),
    [
        ("llama-gqa-tied", "decoder_mask/hidden"),
        ("opt", "decoder_mask/hidden"),
        pytest.param("mistral-window", "decoder_mask/window_4/width", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_mask_is_found(case_of: Callable[[str], Exported], name: str, constant: str, tmp_path: Path) -> None:
    case = case_of(name)
    model = ir.load(case.standard)
    model.graph.initializers[constant].const_value = ir.Tensor(FAULTS[constant])
    save_graph(model, tmp_path / "wrong.onnx")
    found, expected = run_standard(tmp_path / "wrong.onnx", case), run_original(case.original, case)
    off = max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True))
    assert off > 100 * OF_LARGEST * max(np.abs(one).max() for one in expected)


def test_four_bits_and_fp16_come_after(case_of: Callable[[str], Exported], tmp_path: Path) -> None:
    """INT4 weights, then FP16: the rules for TensorRT hold, and each step loses what it may and no more."""
    case = case_of("llama-gqa-tied")
    done = quantize_weights(case.standard, tmp_path / "int4.onnx", target="tensorrt")
    assert done["kept"] == {}
    caches = [name for pair in slots(case.cache) for name in pair]
    for source, out in ((case.standard, "fp16.onnx"), (tmp_path / "int4.onnx", "int4-fp16.onnx")):
        model, _ = apply_passes(ir.load(source), [ToFloat16(half_io=caches)], stage="llm")
        save_graph(model, tmp_path / out)
        onnx.checker.check_model(str(tmp_path / out), full_check=True)
    for name, precision in (("int4.onnx", "int4"), ("fp16.onnx", "fp16"), ("int4-fp16.onnx", "int4")):
        found = check_rules(tmp_path / name, precision=precision, weight_only=True)
        assert not [one for one in found if one.severity == "error"], name
    logits = {name: run_standard(tmp_path / name, case) for name in ("int4.onnx", "fp16.onnx", "int4-fp16.onnx")}
    assert worst_cosine(logits["fp16.onnx"], run_original(case.original, case)) > 0.9999
    # Random weights have nothing to average over: 4 bits are held against their own FP32.
    assert worst_cosine(logits["int4-fp16.onnx"], logits["int4.onnx"]) > 0.999


def norm_model(op_type: str, *, axis: int = -1, bias: bool = False, read_mean: bool = False) -> ir.Model:
    """`y = norm(x)`, or `y, total = norm(x + skip [+ bias])`."""
    x, skip, gain = float_value("x", "batch", 3, 8), float_value("skip", "batch", 3, 8), weight("gain", normal(8))
    skips = op_type == "SkipSimplifiedLayerNormalization"
    inputs = [x, skip, gain, *([weight("bias", normal(8))] if bias else [])] if skips else [x, gain]
    attributes: dict[str, Any] = {"epsilon": 1e-5} if skips else {"epsilon": 1e-5, "axis": axis, "stash_type": 1}
    node = ir.node(
        op_type, inputs, attributes, domain=CONTRIB if skips else "", num_outputs=4 if skips else 2, name="n"
    )
    names = ("y", "mean", "deviation", "total") if skips else ("y", "deviation")
    for value, name in zip(node.outputs, names, strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    outputs = [node.outputs[0], *([node.outputs[3]] if skips else []), *([node.outputs[1]] if read_mean else [])]
    nodes = [node]
    if read_mean:
        nodes.append(ir.node("Identity", [node.outputs[1]], name="reader"))
        nodes[-1].outputs[0].name, nodes[-1].outputs[0].type = "seen", ir.TensorType(ir.DataType.FLOAT)
        outputs[-1] = nodes[-1].outputs[0]
    return make_model([x, skip] if skips else [x], outputs, nodes, 20, com_microsoft=1)


@pytest.mark.parametrize(
    ("op_type", "bias"),
    [
        ("SimplifiedLayerNormalization", False),
        ("SkipSimplifiedLayerNormalization", False),
        ("SkipSimplifiedLayerNormalization", True),
    ],
)
def test_rms_norm_is_explicit(op_type: str, bias: bool) -> None:
    model = norm_model(op_type, bias=bias)
    feeds = {value.name or "": normal(2, 3, 8) for value in model.graph.inputs}
    expected = run(model, feeds)
    model, _ = apply_passes(model, [ExplicitRmsNorm()], stage="llm")
    statistics = ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    skip = ["Add"] * (1 + bias) if op_type.startswith("Skip") else []
    assert [node.op_type for node in model.graph] == skip + statistics
    for found, other in zip(run(model, feeds), expected, strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-5, atol=1e-6)


def test_norms_that_are_read_otherwise_are_declined() -> None:
    model = norm_model("SimplifiedLayerNormalization", axis=1)
    assert "normalises over axis 1" in str(ExplicitRmsNorm().requires(model))
    model = norm_model("SkipSimplifiedLayerNormalization", read_mean=True)
    assert ExplicitRmsNorm().requires(model) == "n: its mean or deviation is read"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 30.0}, "has softcap 30.0"),
        ({"rotary_interleaved": 1}, "has rotary_interleaved 1"),
        ({"k_quant_type": "PER_TENSOR"}, "has k_quant_type PER_TENSOR"),
    ],
)
def test_attention_of_another_kind_is_refused(
    case_of: Callable[[str], Exported], change: dict[str, Any], message: str
) -> None:
    model = ir.load(case_of("llama-gqa-tied").original)
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    for name, value in change.items():
        node.attributes.add(ir.convenience.convert_attribute(name, value))
    with pytest.raises(ExportError, match=f"pass standard-attention cannot run: .*{message}"):
        apply_passes(model, standard_decoder_passes(), stage="llm")


def test_operators_that_the_older_opset_has_not_are_refused() -> None:
    x = float_value("x", "batch", 8)
    node = ir.node("RMSNormalization", [x, weight("gain", normal(8))], name="norm")
    node.outputs[0].name = "y"
    model = make_model([x], list(node.outputs), [node], 23)
    assert LowerOpset(20).requires(model) == "norm: RMSNormalization is not in opset 20"
    blocks = weight("w", np.zeros((8, 4), np.int8)), weight("scales", np.ones((2, 4), np.float32))
    node = ir.node("DequantizeLinear", list(blocks), {"axis": 0, "block_size": 4}, name="dequantize")
    model = make_model([], list(node.outputs), [node], 21)
    assert "dequantize: DequantizeLinear of opset 21 has ['block_size']" in str(LowerOpset(20).requires(model))
    assert LowerOpset(21).requires(model) is None
