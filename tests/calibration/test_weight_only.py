"""Weight-only INT4 and INT8: what is stored is a rounding of the weight, and what is computed is what is stored."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from tests.export.graphs import float_value, make_model, save, weight

from bridgeport.bundle import Bundle
from bridgeport.calibration.data import open_calibration
from bridgeport.calibration.rules import check_rules
from bridgeport.calibration.weight_only import generation_inputs, quantize_weights
from bridgeport.calibration.weight_only.gptq import add_empty_cache, collect_hessians
from bridgeport.errors import CalibrationError, InputError
from bridgeport.export.llm.check import write_with_fp32_activations
from bridgeport.export.llm.int4 import quantize_matmuls
from bridgeport.export.shared_weights import share_weights
from bridgeport.models.small.pictures import held_out

Feed = Mapping[str, Any]
RANDOM = np.random.default_rng(0)
SETTINGS = [("cpu", 4, 64), ("cpu", 8, 32), ("cuda", 4, 128), ("tensorrt", 4, 64), ("tensorrt", 8, 64)]
DECODER = "llm/decoder.onnx"


def normal(*shape: int) -> Any:
    return RANDOM.normal(size=shape).astype(np.float32)


def weights_of(path: Path) -> dict[str, Any]:
    """Output of every MatMul -> its weight `[K, N]`."""
    nodes = (node for node in ir.load(path).graph if node.op_type == "MatMul")
    return {node.outputs[0].name or "": node.inputs[1].const_value.numpy() for node in nodes}  # type: ignore[union-attr]


def decode(path: Path, *, low_first: bool = True) -> dict[str, tuple[Any, Any]]:
    """Output of every quantised product -> its whole numbers `[K, N]` and their scales `[K, N]`, by ONNX's layout."""
    found = {}
    for node in ir.load(path).graph:
        if node.op_type == "MatMulNBits":
            data, scales = (value.const_value.numpy() for value in node.inputs[1:3])  # type: ignore[union-attr]
            bits, size = (node.attributes.get_int(name) for name in ("bits", "block_size"))
            halves = (data & 15, data >> 4) if low_first else (data >> 4, data & 15)
            codes = data if bits == 8 else np.stack(halves, -1).reshape(len(data), -1, size)
            numbers = codes.reshape(len(data), -1).T.astype(np.int32) - 2 ** (bits - 1)
            found[node.outputs[0].name or ""] = numbers, np.repeat(scales.reshape(len(data), -1).T, size, axis=0)
        elif node.op_type == "MatMul" and (source := node.inputs[1].producer()) is not None:  # type: ignore[union-attr]
            assert source.op_type == "DequantizeLinear"
            numbers, scales = (value.const_value.numpy() for value in source.inputs[:2])  # type: ignore[union-attr]
            if (size := source.attributes.get_int("block_size", 0)) > 0:
                scales = np.repeat(scales, size, axis=0)
            found[node.outputs[0].name or ""] = np.asarray(numbers, np.int32), np.broadcast_to(scales, numbers.shape)
    return found


def rounding_fault(original: Any, numbers: Any, scales: Any, bits: int) -> float:
    """The largest difference between a stored number and the nearest level, in levels."""
    levels = np.clip(original / scales, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float(np.abs(levels - numbers).max())


@pytest.fixture(scope="module")
def quantized(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, int], Path]:
    """The small model's decoder, rounded to nearest for a target in so many bits, once."""
    done: dict[tuple[str, int, int], Path] = {}

    def get(target: str, bits: int, block_size: int) -> Path:
        key = target, bits, block_size
        if key not in done:
            done[key] = tmp_path_factory.mktemp("weights") / "decoder.onnx"
            quantize_weights(small_bundle / DECODER, done[key], bits=bits, block_size=block_size, target=target)
        return done[key]

    return get


@pytest.fixture(scope="module")
def texts(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Feed]:
    """What `llm` reads of 18 held-out pictures: prompt, picture and the caption that the FP32 model writes."""
    directory = tmp_path_factory.mktemp("pictures")
    for i, example in enumerate(held_out(18)):
        example.image.save(directory / f"{i}.png")
    data = open_calibration(directory)
    return list(generation_inputs(Bundle.load(small_bundle), data, max_new_tokens=24, threads=1))


class Logits:
    """A decoder in ONNX Runtime, asked for the logits after any token of a prefill."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        # ONNX Runtime makes MatMulNBits of DequantizeLinear and MatMul, and would round activations to INT8 with it.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.graph = onnx.load(str(path), load_external_data=False).graph

    def __call__(self, feed: Feed, position: int) -> Any:
        complete = add_empty_cache(self.graph, {**feed, "logits_position": np.array([position])})
        return self.session.run(["logits"], complete)[0][0]


def test_four_bits_for_the_cpu_are_those_of_an_export(
    small_bundle: Path, quantized: Callable[[str, int, int], Path]
) -> None:
    """Byte for byte the weights, node for node the graph of ONNX Runtime's quantizer as `export` calls it."""
    made, source = ir.load(quantized("cpu", 4, 64)), ir.load(small_bundle / DECODER)
    expected = quantize_matmuls(ir.external_data.load_to_model(source))

    def signature(model: ir.Model) -> list[Any]:
        return [
            (
                n.domain,
                n.op_type,
                n.name,
                [v and v.name for v in n.inputs],
                [v.name for v in n.outputs],
                {k: a.value for k, a in n.attributes.items()},
            )
            for n in model.graph
            if n.op_type != "Constant"
        ]

    assert signature(made) == signature(expected)
    assert set(made.graph.initializers) == set(expected.graph.initializers)
    for name, value in made.graph.initializers.items():
        other = expected.graph.initializers[name].const_value
        assert value.const_value is not None
        assert other is not None
        assert np.array_equal(value.const_value.numpy().ravel(), other.numpy().ravel()), name


@pytest.mark.parametrize(("target", "bits", "block_size"), SETTINGS)
def test_stored_numbers_are_the_nearest_levels(
    small_bundle: Path, quantized: Callable[[str, int, int], Path], target: str, bits: int, block_size: int
) -> None:
    path = quantized(target, bits, block_size)
    originals, stored = weights_of(small_bundle / DECODER), decode(path)
    assert stored.keys() == originals.keys()
    assert len(stored) == 21
    for name, (numbers, scales) in stored.items():
        # Half a level, and 1e-4 for the division in FP32.
        assert rounding_fault(originals[name], numbers, scales, bits) <= 0.5 + 1e-4, name
        largest = np.abs(originals[name]).max()
        assert np.abs(scales).max() <= largest / (2 ** (bits - 1) - 1) * 1.001, f"{name}: a level is wider than needed"
        assert target != "tensorrt" or scales.min() > 0, f"{name}: TensorRT takes positive scales alone"
    if target != "tensorrt" and bits == 4:
        swapped = decode(path, low_first=False)
        assert all(rounding_fault(originals[n], *swapped[n], bits) > 5 for n in swapped), "swapped nibbles must show"


@pytest.mark.parametrize(("target", "bits", "block_size"), SETTINGS)
def test_onnx_runtime_computes_with_what_is_stored(
    small_bundle: Path,
    quantized: Callable[[str, int, int], Path],
    texts: list[Feed],
    tmp_path: Path,
    target: str,
    bits: int,
    block_size: int,
) -> None:
    """Against the FP32 graph with the decoded weights in the place of its own."""
    path = quantized(target, bits, block_size)
    model, stored = ir.load(small_bundle / DECODER), decode(path)
    for node in model.graph:
        if node.op_type == "MatMul":
            numbers, scales = stored[node.outputs[0].name or ""]
            node.inputs[1].const_value = ir.Tensor((numbers * scales).astype(np.float32))  # type: ignore[union-attr]
    ir.save(model, tmp_path / "reference.onnx", external_data="reference.data")
    exact = path.with_name("exact.onnx")
    write_with_fp32_activations(path, exact)  # weights alone are rounded then
    reference, found, original = (Logits(p) for p in (tmp_path / "reference.onnx", exact, small_bundle / DECODER))
    for feed in texts[:3]:
        last = feed["inputs_embeds"].shape[1] - 1
        expected, got = reference(feed, last), found(feed, last)
        # Sums in another order: 1e-6 measured. The rounding itself moves logits by 1e-2 and more.
        np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5 * np.abs(expected).max())
        assert np.abs(got - original(feed, last)).max() > 3e-4 * np.abs(expected).max()


def divergence(reference: Logits, candidate: Logits, feeds: list[Feed]) -> tuple[float, float]:
    """Mean Kullback-Leibler divergence of the next token's distribution, and how often the greedy token is the same.

    Over the last six tokens of each feed.
    """
    losses, same = [], []
    for feed in feeds:
        length = feed["inputs_embeds"].shape[1]
        for position in range(length - 6, length):
            p, q = (log_softmax(one(feed, position)) for one in (reference, candidate))
            losses.append(float((np.exp(p) * (p - q)).sum()))
            same.append(p.argmax() == q.argmax())
    return float(np.mean(losses)), float(np.mean(same))


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_gptq_keeps_more_of_the_small_model_than_rounding(
    small_bundle: Path, quantized: Callable[[str, int, int], Path], texts: list[Feed], tmp_path: Path
) -> None:
    before = sorted(path.name for path in (small_bundle / "llm").iterdir())
    for target in ("cpu", "tensorrt"):
        done = quantize_weights(
            small_bundle / DECODER, tmp_path / f"{target}.onnx", method="gptq", target=target, inputs=texts[:12]
        )
        assert done["layers"] == 21
        assert done["weight_bytes"]["after"] < 0.15 * done["weight_bytes"]["before"]
    assert sorted(path.name for path in (small_bundle / "llm").iterdir()) == before, "the source bundle is read alone"
    reference = Logits(small_bundle / DECODER)
    for target in ("cpu", "tensorrt"):
        rounded, _ = divergence(reference, Logits(quantized(target, 4, 64)), texts[12:])
        fitted, same = divergence(reference, Logits(tmp_path / f"{target}.onnx"), texts[12:])
        assert fitted < 0.75 * rounded, f"{target}: GPTQ {fitted:.4f}, rounding {rounded:.4f}"
        assert same > 0.95
    eight, same = divergence(reference, Logits(quantized("cpu", 8, 32)), texts[12:])
    assert eight < 0.005
    assert same > 0.98


def test_generation_inputs_hold_the_text_that_the_model_writes(small_bundle: Path, texts: list[Feed]) -> None:
    """Greedy: the token after each is the one that the FP32 model finds most likely there."""
    decoder = Logits(small_bundle / DECODER)
    embed = onnxruntime.InferenceSession(small_bundle / "llm/embed_tokens.onnx", providers=["CPUExecutionProvider"])
    for feed in texts[:2]:
        embeds, length = feed["inputs_embeds"][0], feed["inputs_embeds"].shape[1]
        assert feed["attention_mask"].shape == (1, length)
        for position in range(length - 6, length - 1):
            token = decoder(feed, position).argmax()
            [[row]] = embed.run(["inputs_embeds"], {"input_ids": np.array([[token]])})[0]
            assert np.array_equal(row, embeds[position + 1])
            assert not np.array_equal(row, embeds[position])


def test_padding_is_not_in_the_hessians(small_bundle: Path, texts: list[Feed]) -> None:
    name = "/model/layers.0/input_layernorm/output_0"
    feed = {key: texts[0][key] for key in ("inputs_embeds", "attention_mask", "logits_position")}
    padded = {
        **feed,
        "inputs_embeds": np.pad(feed["inputs_embeds"], ((0, 0), (0, 4), (0, 0)), constant_values=3.0),
        "attention_mask": np.pad(feed["attention_mask"], ((0, 0), (0, 4))),
    }
    alone, both = (collect_hessians(small_bundle / DECODER, [name], [one])[name] for one in (feed, padded))
    assert alone.shape == (128, 128)
    # FP32 sums of two shapes of one product.
    np.testing.assert_allclose(both, alone, rtol=1e-4, atol=1e-4 * np.abs(alone).max())


def products(*depths: int) -> ir.Model:
    """`y = x @ W0 @ W1 ...`, the depths of the weights given."""
    value, nodes = float_value("x", "batch", depths[0]), []
    first = value
    for i, (rows, columns) in enumerate(itertools.pairwise(depths)):
        nodes.append(ir.node("MatMul", [value, weight(f"w{i}", normal(rows, columns))], name=f"product{i}"))
        value = nodes[-1].outputs[0]
        value.name, value.type, value.shape = f"y{i}", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", columns])
    return make_model([first], [value], nodes)


def test_blocks_that_do_not_fit_get_smaller_or_the_weight_stays(tmp_path: Path) -> None:
    path, out = save(products(128, 96, 40, 64), tmp_path), tmp_path / "out.onnx"
    done = quantize_weights(path, out, block_size=128, target="tensorrt")
    assert done["other_block_sizes"] == {"product1": 32}
    assert done["kept"] == {"product2": "K 40 is no multiple of a block size (32, 64, 128)"}
    assert done["layers"] == 2
    assert ir.load(out).graph.opset_imports[""] == 21
    assert not [one for one in check_rules(out, precision="int4", weight_only=True) if one.severity == "error"]
    onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"]).run(None, {"x": normal(2, 128)})
    # MatMulNBits fills the last block.
    done = quantize_weights(path, tmp_path / "cpu.onnx", block_size=64, keep=frozenset({"product0"}))
    assert done["kept"] == {"product0": "asked for"}
    assert [node.op_type for node in ir.load(tmp_path / "cpu.onnx").graph] == ["MatMul", "MatMulNBits", "MatMulNBits"]


def test_rounding_leaves_the_callers_logging_alone(tmp_path: Path) -> None:
    """ONNX Runtime's quantizer sets up the root logger when it is imported, and everybody's INFO lines show then."""
    save(products(64, 8), tmp_path)
    code = (
        "import logging, sys; from pathlib import Path\n"
        "from bridgeport.calibration.weight_only import quantize_weights\n"
        "quantize_weights(Path(sys.argv[1]) / 'model.onnx', Path(sys.argv[1]) / 'out.onnx')\n"
        "root = logging.getLogger()\n"
        "sys.exit(f'{root.handlers} {root.level}' if root.handlers or root.level != logging.WARNING else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_weight_of_two_products_is_stored_once(tmp_path: Path) -> None:
    model = products(64, 64, 64)
    model.graph[1].replace_input_with(1, model.graph[0].inputs[1])
    del model.graph.initializers["w1"]
    path = save(model, tmp_path)
    for target, stored in (("cpu", 2), ("tensorrt", 2)):
        quantize_weights(path, tmp_path / f"{target}.onnx", target=target)
        made = ir.load(tmp_path / f"{target}.onnx")
        assert len(made.graph.initializers) == stored
        assert len(decode(tmp_path / f"{target}.onnx")) == 2


def test_graphs_share_quantised_weights(small_bundle: Path, texts: list[Feed], tmp_path: Path) -> None:
    """As the stages of one language model do: 4-bit tensors lie in one file, and read back as they were."""
    first, second = (tmp_path / name / "decoder.onnx" for name in ("one", "two"))
    quantize_weights(small_bundle / DECODER, first, target="tensorrt")
    shutil.copytree(first.parent, second.parent)
    expected, size = Logits(first)(texts[0], 3), Path(f"{first}.data").stat().st_size
    share_weights({first: tmp_path / "llm" / "a.onnx", second: tmp_path / "llm" / "b.onnx"})
    assert (tmp_path / "llm" / "a.onnx.data").stat().st_size < 1.1 * size
    for name in ("a.onnx", "b.onnx"):
        assert np.array_equal(Logits(tmp_path / "llm" / name)(texts[0], 3), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "weight-only bits 3: accepted are 4, 8"),
        ({"target": "npu"}, "weight-only target 'npu': accepted are cpu, cuda, tensorrt"),
        ({"method": "awq"}, "weight-only method 'awq': accepted are rtn, gptq"),
        ({"block_size": 48}, "weight-only block_size 48: accepted are 16, 32, 64, 128, 256"),
        ({"block_size": 16, "target": "tensorrt"}, "weight-only block_size 16: accepted are 32, 64, 128"),
        ({"method": "gptq"}, "gptq needs calibration inputs; give some, or use method rtn"),
        ({"method": "gptq", "bits": 8, "inputs": []}, "gptq is for 4 bits"),
        ({"keep": frozenset({"lm_head"})}, "'lm_head' is no MatMul of this graph"),
        ({"out": "model.onnx"}, "cannot replace the graph that it is made from"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = save(products(64, 8), tmp_path)
    with pytest.raises(InputError, match=message):
        quantize_weights(path, tmp_path / options.pop("out", "out.onnx"), **options)
    assert not (tmp_path / "out.onnx").exists()


def test_samples_without_numbers_and_quantised_graphs_are_refused(tmp_path: Path) -> None:
    path, out = save(products(64, 64, 8), tmp_path), tmp_path / "out.onnx"
    with pytest.raises(CalibrationError, match="GPTQ got no calibration samples"):
        quantize_weights(path, out, method="gptq", inputs=[])
    with pytest.raises(CalibrationError, match="x is not finite on a calibration sample"):
        quantize_weights(path, out, method="gptq", inputs=[{"x": np.full((1, 64), np.nan, np.float32)}])
    assert not out.exists()
    quantize_weights(path, out)
    with pytest.raises(InputError, match="product0_Q4: the graph is quantised already; start from the FP32 bundle"):
        quantize_weights(out, tmp_path / "again.onnx")
