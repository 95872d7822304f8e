"""Whole checkpoints to bundles: what is written, what is recorded, and that a failure leaves nothing."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tests.checkpoints import write_blip2_checkpoint

from bridgeport.bundle import Bundle
from bridgeport.errors import CheckpointError, ExportError, InputError, OutputError
from bridgeport.export import checkpoint as module
from bridgeport.export import export_checkpoint
from bridgeport.export import stages as stages_module
from bridgeport.models import load_checkpoint

# An odd picture with patches that do not fill it, no bias in the fused projection, stored in FP16 in two shards.
ODD = {
    "text": "llama",
    "image_size": 45,
    "patch_size": 14,
    "vision_heads": 4,
    "vision_layers": 3,
    "qkv_bias": False,
    "qformer_layers": 4,
    "cross_attention_frequency": 3,
    "num_query_tokens": 5,
    "dtype": "float16",
    "max_shard_size": "200KB",
    "seed": 11,
}


@pytest.fixture(scope="module")
def odd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blip2_checkpoint(tmp_path_factory.mktemp("odd") / "checkpoint", **ODD)


@pytest.fixture(scope="module")
def odd(odd_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The odd checkpoint, exported once with INT4 in the language model."""
    return export_checkpoint(odd_checkpoint, tmp_path_factory.mktemp("bundle") / "out", precision="int4")


def test_files_and_external_data(odd: Bundle) -> None:
    assert sorted(record.path for record in odd.manifest.files) == [
        "checkpoint/config.json",
        "connector/attention.onnx",
        "connector/model.onnx",
        "connector/model.onnx.data",
        "encoder/model.onnx",
        "encoder/model.onnx.data",
        "llm/decoder.onnx",
        "llm/decoder.onnx.data",
        "llm/embed_tokens.onnx",
        "llm/embed_tokens.onnx.data",
        "tokenizer/tokenizer.json",
    ]
    assert sorted(path.name for path in odd.path.parent.iterdir()) == ["out"]
    assert Bundle.load(odd.path).manifest == odd.manifest


def test_nothing_of_the_exporting_machine_is_in_the_graphs(odd: Bundle) -> None:
    for path in odd.path.rglob("*.onnx"):
        assert b"site-packages" not in path.read_bytes(), path
        assert b"stack_trace" not in path.read_bytes(), path


def test_the_attention_variant_uses_the_connectors_weights_file(odd: Bundle) -> None:
    tensors = {}
    for name in ("model", "attention"):
        graph = onnx.load(str(odd.path / f"connector/{name}.onnx"), load_external_data=False).graph
        tensors[name] = {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        }
    assert tensors["attention"] == tensors["model"]
    assert {entry["location"] for entry in tensors["attention"].values()} == {"model.onnx.data"}


@pytest.mark.parametrize("stage", ["encoder", "connector", "embed_tokens"])
@pytest.mark.parametrize("batch", [1, 4])
def test_stages_equal_the_checkpoint(odd: Bundle, odd_checkpoint: Path, stage: str, batch: int) -> None:
    model = load_checkpoint(odd_checkpoint)
    spec = model.contracts[stage].inputs[0]
    shape = [{"batch": batch, "sequence": 6}[dim] if isinstance(dim, str) else dim for dim in spec.shape]
    random = np.random.default_rng(batch)
    array: Any = random.integers(0, 300, shape) if spec.dtype == "int64" else random.normal(size=shape).astype("f4")
    session = onnxruntime.InferenceSession(odd.graph(stage), providers=["CPUExecutionProvider"])
    got = session.run(None, {spec.name: array})[0]
    with torch.inference_mode():
        expected = model.load_stage(stage)(torch.from_numpy(array)).numpy()
    # FP32 with sums in another order, over at most four layers and values of a few units; the export's own check
    # plants faults against the same limits.
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))


def test_cross_attention_sums_to_one_and_equals_the_module(odd: Bundle, odd_checkpoint: Path) -> None:
    connector: Any = load_checkpoint(odd_checkpoint).load_stage("connector")
    embeds = np.random.default_rng(0).normal(size=(2, 10, 32)).astype(np.float32)
    session = onnxruntime.InferenceSession(odd.graph("connector", "attention"), providers=["CPUExecutionProvider"])
    features, attention = session.run(["image_features", "cross_attention"], {"image_embeds": embeds})
    with torch.inference_mode():
        expected = connector.with_attention(torch.from_numpy(embeds))
    # Layers 0 and 3 of 4 read the image; attention weights are at most 1, so 1e-5 is absolute and relative in one.
    assert attention.shape == (2, 2, 2, 5, 10)
    np.testing.assert_allclose(attention, expected[1].numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(attention.sum(axis=-1), 1, rtol=0, atol=1e-5)
    np.testing.assert_allclose(features, expected[0].numpy(), rtol=1e-4, atol=1e-4)


def test_the_manifest_records_what_was_made_and_checked(odd: Bundle) -> None:
    manifest = odd.manifest
    assert [(stage.contract.name, stage.precision, stage.opset) for stage in manifest.stages] == [
        ("encoder", "fp32", 20),
        ("connector", "fp32", 20),
        ("embed_tokens", "fp32", 20),
        ("llm", "int4", 22),
    ]
    assert manifest.checkpoint.architecture == "Blip2ForConditionalGeneration"
    assert len(manifest.checkpoint.sha256) > 3  # config, index and at least two shards
    checks = manifest.checks["export"]["stages"]
    for stage in ("encoder", "connector", "embed_tokens"):
        assert checks[stage]["onnx_checker"] == checks[stage]["polygraphy_lint"] == "clean"
        assert checks[stage]["onnxruntime"]["batch_sizes"] == [1, 3, 5]
    assert checks["encoder"]["passes"]["split-fused-qkv"] == "changed"
    assert checks["encoder"]["layer_normalization"] == 7
    assert checks["encoder"]["operators"].get("Gather") is None
    assert checks["connector"]["attention"]["polygraphy_lint"] == "clean"
    assert checks["llm"]["onnxruntime"]["decode_steps"] == 2
    assert manifest.checks["export"]["processor"]["pictures"] > 10


def test_an_existing_bundle_is_replaced_only_with_force(odd_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match=r"exists and is not a bundle; .*--force"):
        export_checkpoint(odd_checkpoint, out)
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "mine.txt"]


def test_force_replaces_all_of_it(
    odd_checkpoint: Path, odd: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "mine.txt").write_text("old")

    def write(_model: Any, _cache: Any, staging: Path, *_: Any) -> Any:
        (staging / "new.txt").write_text("new")
        return odd.manifest

    monkeypatch.setattr(module, "_write_bundle", write)
    export_checkpoint(odd_checkpoint, out, force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "new.txt"]


def test_the_checkpoint_is_never_replaced(odd_checkpoint: Path) -> None:
    before = sorted(odd_checkpoint.rglob("*"))
    with pytest.raises(OutputError, match="so it is never replaced"):
        export_checkpoint(odd_checkpoint, odd_checkpoint, force=True)
    with pytest.raises(OutputError, match="so it is never replaced"):
        export_checkpoint(odd_checkpoint, odd_checkpoint.parent, force=True)
    assert sorted(odd_checkpoint.rglob("*")) == before


def test_too_little_room_is_told_before_anything_is_written(
    odd_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"has 0\.0 GB free, this export needs up to 0\.1 GB"):
        export_checkpoint(odd_checkpoint, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_leaves_nothing(
    odd_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_module: Any, _contract: Any, path: Path, **_: Any) -> Any:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(stages_module, "trace_and_save", fail)
    with pytest.raises(OutputError, match=r"the disk is full: .*bundle was not written"):
        export_checkpoint(odd_checkpoint, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_failed_check_leaves_nothing(odd_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages_module, "OPSET", 21)
    with pytest.raises(ExportError, match="stage encoder, check opset: the graph has 20, 21 is wanted"):
        export_checkpoint(odd_checkpoint, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precision": "fp16"},
            "precision fp16 for cpu needs pictures to calibrate and to judge with; add --calibration",
        ),
        ({"precision": "int8"}, "precision int8 for cpu needs pictures"),
        ({"precision": "int3"}, "precision 'int3' is unknown; accepted are fp32, fp16, fp8, int8, int4"),
        ({"target": "cuda"}, "precision fp32 for cuda needs pictures"),
        ({"precision": "int4", "target": "tensorrt"}, "precision int4 for tensorrt needs pictures"),
        ({"target": "tpu"}, "target 'tpu' is unknown"),
        ({"calibration": "pictures"}, "precision fp32 for cpu needs no calibration data; leave"),
    ],
)
def test_bad_options_are_said_before_the_checkpoint_is_opened(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export_checkpoint(tmp_path / "no-such-checkpoint", tmp_path / "bundle", **options)


def test_a_missing_checkpoint_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
