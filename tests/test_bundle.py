"""Bundles: verified whole before anything is parsed, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from bridgeport.bundle import Bundle, is_bundle, sha256, staged_directory, write_manifest
from bridgeport.errors import BundleError, BundleIntegrityError, BundleSchemaError, OutputError
from bridgeport.manifest import (
    SCHEMA_VERSION,
    CheckpointRecord,
    GenerationContract,
    ImageContract,
    ImageSegment,
    Manifest,
    PromptContract,
    Resize,
    StageRecord,
    TextSegment,
    Whole,
)
from bridgeport.models.contract import Axis, KvCacheContract, StageContract, TensorSpec

STAGES: tuple[Any, ...] = ("encoder", "connector", "embed_tokens", "llm")


def graph_with_external_data(location: str | None) -> onnx.ModelProto:
    """One initializer; with a `location`, its values lie there."""
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    if location is not None:
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "graph",
        [value("x", TensorProto.FLOAT, [2])],
        [value("y", TensorProto.FLOAT, [2])],
        [tensor],
    )
    return helper.make_model(graph)


def make_manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "bridgeport_version": "0.1.0",
        "model_kind": "blip-2",
        "target": "cpu",
        "checkpoint": CheckpointRecord(architecture="A", model_type="blip-2", text_model_type="opt", sha256={}),
        "stages": tuple(
            StageRecord(
                contract=StageContract(
                    name=name,
                    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 2)),),
                    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 2)),),
                    axes=(Axis(name="batch", min=1, opt=1, max=4),),
                ),
                file=f"{name}/model.onnx",
                precision="fp32",
                opset=20,
                variants={"attention": "connector/attention.onnx"} if name == "connector" else {},
            )
            for name in STAGES
        ),
        "kv_cache": KvCacheContract(num_layers=1, num_heads=1, head_size=8, dtype="float32", shared_buffer=True),
        "image": ImageContract(steps=(Resize(height=2, width=2, resample="bicubic"),), tiling=Whole(tokens=2)),
        "prompt": PromptContract(
            segments=(ImageSegment(), TextSegment(add_special_tokens=True)),
            image_token_id=3,
            image_token="<image>",
            placeholder="<|kept|>",
        ),
        "generation": GenerationContract(
            eos_token_ids=(2,), pad_token_id=None, bos_token_id=1, context_length=8, vocab_size=4
        ),
        "tokenizer": "tokenizer/tokenizer.json",
    }
    return Manifest(**fields | changes)


def fill(root: Path, **changes: Any) -> None:
    """The files of a bundle: graphs with their data beside them, a tokenizer, the manifest."""
    for name in STAGES:
        folder = root / name
        folder.mkdir()
        onnx.save(graph_with_external_data("model.onnx.data"), folder / "model.onnx")
        (folder / "model.onnx.data").write_bytes(b"\0\0\x80?\0\0\0@")
    onnx.save(graph_with_external_data("model.onnx.data"), root / "connector" / "attention.onnx")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    write_manifest(root, make_manifest(**changes))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    root.mkdir()
    fill(root)
    return root


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = bundle / "manifest.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def record(document: dict[str, Any], path: str) -> dict[str, Any]:
    (found,) = (each for each in document["files"] if each["path"] == path)
    assert isinstance(found, dict)
    return found


def test_a_whole_bundle_loads(bundle: Path) -> None:
    loaded = Bundle.load(bundle)
    assert is_bundle(bundle)
    assert loaded.graph("llm") == bundle / "llm" / "model.onnx"
    assert loaded.graph("connector", "attention") == bundle / "connector" / "attention.onnx"
    assert loaded.manifest.stage("encoder").contract.axis("batch").max == 4
    with pytest.raises(KeyError):
        loaded.file("other")
    with pytest.raises(KeyError):
        loaded.graph("vision")
    with pytest.raises(KeyError):
        loaded.graph("llm", "other")


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "absent", "absent does not exist; a bundle is a directory"),
        (tmp_path / "file", "file is a file; a bundle is a directory"),
        (tmp_path, "has no manifest.json, so it is not a bundle"),
    ):
        with pytest.raises(BundleError, match=message):
            Bundle.load(path)


@pytest.mark.parametrize("file", ["llm/model.onnx", "llm/model.onnx.data", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("where", [0, -1])
def test_a_flipped_byte(bundle: Path, file: str, where: int) -> None:
    content = bytearray((bundle / file).read_bytes())
    content[where] ^= 1
    (bundle / file).write_bytes(content)
    with pytest.raises(BundleIntegrityError, match=rf"{file} has SHA-256 .*the file was changed"):
        Bundle.load(bundle)


def test_a_missing_file(bundle: Path) -> None:
    (bundle / "encoder" / "model.onnx.data").unlink()
    with pytest.raises(BundleIntegrityError, match=r"encoder/model.onnx.data is missing"):
        Bundle.load(bundle)


def test_a_file_of_another_size(bundle: Path) -> None:
    with (bundle / "encoder" / "model.onnx.data").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleIntegrityError, match="has 9 bytes, its manifest says 8"):
        Bundle.load(bundle)


def test_a_newer_schema(bundle: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["schema_version"] = SCHEMA_VERSION + 1
        document["something_new"] = True

    rewrite(bundle, change)
    with pytest.raises(BundleSchemaError, match=rf"schema_version {SCHEMA_VERSION + 1}, newer than .*upgrade"):
        Bundle.load(bundle)


@pytest.mark.parametrize("version", [None, "1", 0, -1])
def test_a_schema_that_is_no_version(bundle: Path, version: Any) -> None:
    rewrite(bundle, lambda document: document.update(schema_version=version))
    with pytest.raises(BundleSchemaError, match="has schema_version"):
        Bundle.load(bundle)


def test_unknown_and_missing_keys(bundle: Path) -> None:
    rewrite(bundle, lambda document: document["image"].update(crop=True))
    with pytest.raises(BundleSchemaError, match=r"image\.crop: Extra inputs are not permitted \(1 in all\)"):
        Bundle.load(bundle)
    rewrite(bundle, lambda document: (document["image"].pop("crop"), document.pop("image")))
    with pytest.raises(BundleSchemaError, match=r"image: Field required"):
        Bundle.load(bundle)


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_a_manifest_that_is_no_json(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleIntegrityError, match="cannot be read as JSON"):
        Bundle.load(bundle)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/hostname", "encoder/../../secret", "C:/secret", "..\\secret", "", "encoder/.."]
)
def test_a_path_that_leaves_the_bundle(bundle: Path, path: str) -> None:
    (bundle.parent / "secret").write_bytes(b"s")

    def change(document: dict[str, Any]) -> None:
        document["files"].append({"path": path, "size": 1, "sha256": "0" * 64})

    rewrite(bundle, change)
    with pytest.raises(BundleIntegrityError, match="which leaves the bundle; do not use it"):
        Bundle.load(bundle)


@pytest.mark.parametrize("name", ["encoder/model.onnx.data", "encoder", "manifest.json"])
def test_symbolic_links_are_refused(bundle: Path, name: str) -> None:
    """Even one that leads to the very same content: what it leads to can change between the check and the use."""
    outside = bundle.parent / "outside"
    (bundle / name).rename(outside)
    (bundle / name).symlink_to(outside)
    with pytest.raises(BundleIntegrityError, match=f"{name} is a symbolic link"):
        Bundle.load(bundle)


@pytest.mark.parametrize(
    "location",
    ["../tokenizer/tokenizer.json", "/etc/hostname", "../../secret", "other.data", "", "sub\\model.onnx.data", "."],
)
def test_external_data_outside_the_bundle(bundle: Path, location: str) -> None:
    """The hashes are right: it is the graph that points elsewhere."""
    (bundle.parent / "secret").write_bytes(b"\0" * 8)
    onnx.save(graph_with_external_data(location), bundle / "llm" / "model.onnx")
    write_manifest(bundle, make_manifest())
    with pytest.raises(BundleIntegrityError, match=r"llm/model.onnx points to external data at .*do not use it"):
        Bundle.load(bundle)


def test_a_graph_that_is_no_protobuf(bundle: Path) -> None:
    (bundle / "llm" / "model.onnx").write_bytes(b"\xff\xff\xff no graph")
    write_manifest(bundle, make_manifest())
    with pytest.raises(BundleIntegrityError, match="is not an ONNX file"):
        Bundle.load(bundle)


def test_a_manifest_that_uses_what_it_does_not_list(bundle: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["files"].remove(record(document, "connector/attention.onnx"))

    rewrite(bundle, change)
    with pytest.raises(BundleIntegrityError, match=r"uses connector/attention.onnx but does not list it"):
        Bundle.load(bundle)


def test_the_manifest_records_every_file(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("more")
    manifest = write_manifest(bundle, make_manifest())
    assert {each.path for each in manifest.files} == {
        path.relative_to(bundle).as_posix()
        for path in bundle.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert Bundle.load(bundle).manifest == manifest
    assert {each.path: each.sha256 for each in manifest.files}["notes.txt"] == sha256(bundle / "notes.txt")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_staged_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "bundle"
    with staged_directory(target) as staging:
        fill(staging)
        assert not target.exists()
        assert staging.parent == target.parent
    Bundle.load(target)
    assert list(target.parent.iterdir()) == [target]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def stage_and_fail(target: Path, error: Exception, **options: Any) -> None:
    """Write half a bundle, then raise `error`."""
    with staged_directory(target, **options) as staging:
        (staging / "half").write_text("x")
        raise error


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        stage_and_fail(tmp_path / "bundle", ZeroDivisionError())
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_bundle(bundle: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        stage_and_fail(bundle, ZeroDivisionError(), force=True)
    Bundle.load(bundle)
    assert list(bundle.parent.iterdir()) == [bundle]


def test_an_existing_directory_needs_force(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for path, message in ((bundle, "is a bundle already; .*--force"), (other, "exists and is not a bundle; .*--force")):
        with pytest.raises(OutputError, match=message), staged_directory(path):
            pytest.fail("must not begin")
    assert (other / "thesis.txt").read_text() == "mine"
    with staged_directory(bundle, force=True) as staging:
        (staging / "only").write_text("x")
    assert [path.name for path in bundle.iterdir()] == ["only"]
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle", "other"}


def test_an_empty_directory_needs_none(tmp_path: Path) -> None:
    target = tmp_path / "empty"
    target.mkdir()
    with staged_directory(target) as staging:
        (staging / "file").write_text("x")
    assert (target / "file").exists()


@pytest.mark.parametrize("force", [False, True])
def test_what_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    file, link, kept = tmp_path / "file", tmp_path / "link", tmp_path / "kept"
    file.write_text("x")
    (kept / "inside").mkdir(parents=True)
    link.symlink_to(kept)
    for path in (file, link):
        with pytest.raises(OutputError, match="is not a directory"), staged_directory(path, force=force):
            pytest.fail("must not begin")
    with (
        pytest.raises(OutputError, match="so it is never replaced"),
        staged_directory(kept, force=force, protect=(kept / "inside",)),
    ):
        pytest.fail("must not begin")
    monkeypatch.chdir(kept / "inside")
    with pytest.raises(OutputError, match="so it is never replaced"), staged_directory(kept, force=force):
        pytest.fail("must not begin")
    assert (kept / "inside").is_dir()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(tmp_path: Path, number: int) -> None:
    with pytest.raises(OutputError, match=r"the disk is full: .*/bundle was not written; free some space"):
        stage_and_fail(tmp_path / "bundle", OSError(number, os.strerror(number), "half"))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_may_not_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"may not be written .*name another place"),
        staged_directory(tmp_path / "bundle"),
    ):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere")
    assert list(tmp_path.iterdir()) == []


def test_other_faults_of_the_system_are_not_disguised(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output error"), staged_directory(tmp_path / "bundle"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_failed_rename_brings_the_old_directory_back(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail_on_staging(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_staging)
    with pytest.raises(OSError, match="Input/output"), staged_directory(bundle, force=True) as staging:
        (staging / "new").write_text("x")
    monkeypatch.undo()
    Bundle.load(bundle)
    assert list(bundle.parent.iterdir()) == [bundle]
