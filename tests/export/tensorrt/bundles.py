"""A bundle for TensorRT, small enough to write for every test and whole: the chain runs it from picture to text.

Each stage is one product or little more. `llm` has a cache that grows by concatenation, as decoders for TensorRT have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from bridgeport.bundle import Bundle, write_manifest
from bridgeport.engine_record import MachineRecord
from bridgeport.manifest import (
    CheckpointRecord,
    GenerationContract,
    ImageContract,
    Manifest,
    Normalize,
    PromptContract,
    Rescale,
    Resize,
    StageRecord,
    TextSegment,
    Whole,
)
from bridgeport.models.contract import Axis, KvCacheContract, StageContract, TensorSpec

SIDE, TOKENS, WIDTH, VOCAB = 4, 2, 8, 12
PLACEHOLDER = "<|kept|>"
_RNG = np.random.default_rng(3)
_WEIGHTS = {
    "encoder": _RNG.standard_normal((3 * SIDE * SIDE // TOKENS, WIDTH)),
    "connector": _RNG.standard_normal((WIDTH, WIDTH)),
    "embed_tokens": _RNG.standard_normal((VOCAB, WIDTH)),
    "llm": _RNG.standard_normal((WIDTH, VOCAB)),
}
CACHE = KvCacheContract(num_layers=1, num_heads=1, head_size=WIDTH, dtype="float32", shared_buffer=False)
MACHINE = MachineRecord(
    platform="linux-aarch64",
    gpu="Orin",
    compute_capability="8.7",
    memory=16 << 30,
    tensorrt="10.3.0.30",
    cuda="12.6",
    driver="540.4.0",
    l4t="36.4.3",
    jetpack="6.2",
)


def write_bundle(folder: Path, *, target: str = "tensorrt", domain: str | None = None) -> Bundle:
    """Write it. `domain`: an operator set that the decoder imports besides ai.onnx."""
    graphs = {"encoder": _encoder(), "connector": _connector(), "embed_tokens": _embed_tokens(), "llm": _llm()}
    files = {"encoder": "encoder/model.onnx", "connector": "connector/model.onnx"}
    files |= {"embed_tokens": "llm/embed_tokens.onnx", "llm": "llm/decoder.onnx"}
    for name, model in graphs.items():
        path = folder / files[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        if domain is not None and name == "llm":
            model.opset_import.append(helper.make_opsetid(domain, 1))
        external = name == "encoder"  # one with its weights beside it
        onnx.save(model, str(path), save_as_external_data=external, location="model.onnx.data", size_threshold=256)
    (folder / "tokenizer").mkdir()
    _tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    stages = tuple(
        StageRecord(contract=contract, file=files[contract.name], precision="fp32", opset=20)
        for contract in contracts()
    )
    return Bundle(folder, write_manifest(folder, _manifest(stages, target)))


def contracts() -> tuple[StageContract, ...]:
    """Of the four stages."""
    batch = Axis(name="batch", min=1, opt=1, max=8)
    sequence, total = (Axis(name=name, min=1, opt=16, max=64) for name in ("sequence", "total_sequence"))
    pixels = TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, SIDE, SIDE))
    embeds = TensorSpec(name="image_embeds", dtype="float32", shape=("batch", TOKENS, WIDTH))
    features = TensorSpec(name="image_features", dtype="float32", shape=("batch", TOKENS, WIDTH))
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence"))
    words = TensorSpec(name="inputs_embeds", dtype="float32", shape=("batch", "sequence", WIDTH))
    mask = TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "total_sequence"))
    position = TensorSpec(name="logits_position", dtype="int64", shape=("batch",))
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch", VOCAB))
    return (
        StageContract(name="encoder", inputs=(pixels,), outputs=(embeds,), axes=(batch,)),
        StageContract(name="connector", inputs=(embeds,), outputs=(features,), axes=(batch,)),
        StageContract(name="embed_tokens", inputs=(ids,), outputs=(words,), axes=(batch, sequence)),
        StageContract(name="llm", inputs=(words, mask, position), outputs=(logits,), axes=(batch, sequence, total)),
    )


def _manifest(stages: tuple[StageRecord, ...], target: str) -> Manifest:
    fields: dict[str, Any] = {
        "bridgeport_version": "0.1.0",
        "model_kind": "llava",
        "target": target,
        "checkpoint": CheckpointRecord(architecture="A", model_type="llava", text_model_type="llama", sha256={}),
        "stages": stages,
        "kv_cache": CACHE,
        "image": ImageContract(
            steps=(
                Resize(height=SIDE, width=SIDE, resample="bicubic"),
                Rescale(factor=1 / 255),
                Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            ),
            tiling=Whole(tokens=TOKENS),
        ),
        "prompt": PromptContract(
            segments=(TextSegment(template="{images}{prompt}", add_special_tokens=False),),
            image_token_id=3,
            image_token="<image>",
            placeholder=PLACEHOLDER,
        ),
        "generation": GenerationContract(
            eos_token_ids=(2,), pad_token_id=0, bos_token_id=1, context_length=64, vocab_size=VOCAB, max_new_tokens=4
        ),
        "tokenizer": "tokenizer/tokenizer.json",
    }
    return Manifest(**fields)


def _tokenizer() -> Tokenizer:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "[UNK]": 4}
    words |= {word: 5 + at for at, word in enumerate(("what", "is", "this", "a", "red", "shape", "in"))}
    tokenizer = Tokenizer(WordLevel({**words, PLACEHOLDER: 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([AddedToken(PLACEHOLDER, special=True, normalized=False)])
    return tokenizer


def _model(stage: str, nodes: list[Any], inputs: list[Any], outputs: list[Any], **constants: Any) -> onnx.ModelProto:
    arrays = {"weight": _WEIGHTS[stage].astype(np.float32), **constants}
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, stage, inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _value(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _encoder() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "rows"], ["patches"], "patch"),
        helper.make_node("MatMul", ["patches", "weight"], ["image_embeds"], "project"),
    ]
    inputs = [_value("pixel_values", "batch", 3, SIDE, SIDE)]
    rows = np.array([-1, TOKENS, 3 * SIDE * SIDE // TOKENS], np.int64)
    return _model("encoder", nodes, inputs, [_value("image_embeds", "batch", TOKENS, WIDTH)], rows=rows)


def _connector() -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["image_embeds", "weight"], ["image_features"], "project")]
    inputs = [_value("image_embeds", "batch", TOKENS, WIDTH)]
    return _model("connector", nodes, inputs, [_value("image_features", "batch", TOKENS, WIDTH)])


def _embed_tokens() -> onnx.ModelProto:
    nodes = [helper.make_node("Gather", ["weight", "input_ids"], ["inputs_embeds"], "look_up")]
    inputs = [_value("input_ids", "batch", "sequence", kind=TensorProto.INT64)]
    return _model("embed_tokens", nodes, inputs, [_value("inputs_embeds", "batch", "sequence", WIDTH)])


def _llm() -> onnx.ModelProto:
    """Logits of the token at `logits_position`, moved by the number of places that hold one."""
    nodes = [
        helper.make_node("Unsqueeze", ["inputs_embeds", "one"], ["new"], "head"),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], "keys", axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], "values", axis=2),
        helper.make_node("Unsqueeze", ["logits_position", "one"], ["at"], "place"),
        helper.make_node("GatherND", ["inputs_embeds", "at"], ["last"], "take", batch_dims=1),
        helper.make_node("MatMul", ["last", "weight"], ["scores"], "lm_head"),
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["held"], "count", keepdims=1),
        helper.make_node("Cast", ["held"], ["length"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Add", ["scores", "length"], ["logits"], "add"),
    ]
    inputs = [
        _value("inputs_embeds", "batch", "sequence", WIDTH),
        _value("attention_mask", "batch", "total_sequence", kind=TensorProto.INT64),
        _value("logits_position", "batch", kind=TensorProto.INT64),
        *(_value(f"past_key_values.0.{kind}", "batch", 1, "past_sequence", WIDTH) for kind in ("key", "value")),
    ]
    outputs = [
        _value("logits", "batch", VOCAB),
        *(_value(f"present.0.{kind}", "batch", 1, "total_sequence", WIDTH) for kind in ("key", "value")),
    ]
    return _model("llm", nodes, inputs, outputs, one=np.array([1], np.int64))
