"""Stages of one tiny graph each, for tests of profiles, corners and memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import parser

from bridgeport.bundle import Bundle, read_manifest, write_manifest
from bridgeport.export.graph import save_graph
from bridgeport.manifest import Manifest, StageRecord
from bridgeport.models.contract import Axis, StageContract, TensorSpec

WIDTH = 4
LARGEST = 8


def contract(*, low: int = 1, best: int = 2, high: int = LARGEST) -> StageContract:
    """`x` `[batch, 4]` to `y` `[batch, 4]`."""
    return StageContract(
        name="encoder",
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", WIDTH)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", WIDTH)),),
        axes=(Axis(name="batch", min=low, opt=best, max=high),),
    )


def record(of: StageContract | None = None, *, precision: Any = "fp32") -> StageRecord:
    """A stage that has this contract."""
    return StageRecord(contract=of or contract(), file="encoder/model.onnx", precision=precision, opset=20)


class NoCache:
    """All of a manifest that a stage without a cache is asked about."""

    kv_cache = None
    flamingo = None


def manifest() -> Manifest:
    """Of a bundle without a language model."""
    stand_in: Any = NoCache()
    found: Manifest = stand_in
    return found


def write_graph(directory: Path, body: str, *, x: str = "batch, 4", y: str = "batch, 4", more: str = "") -> Path:
    """`x` -> `y` in ONNX's text form."""
    text = f'<ir_version: 10, opset_import: ["": 20]>\nstage (float[{x}] x{more}) => (float[{y}] y) {{ {body} }}'
    path = directory / "model.onnx"
    onnx.save(parser.parse_model(text), path)
    return path


def planted(bundle: Path, out: Path, stage: str, edit: Callable[[ir.Model], Any]) -> Path:
    """A copy of `bundle` whose graph of `stage` was edited, its manifest in order."""
    shutil.copytree(bundle, out)
    path = Bundle.load(out).graph(stage)
    model = ir.load(bundle / path.relative_to(out))
    edit(model)
    save_graph(model, path)
    write_manifest(out, read_manifest(out))
    return out


def edited(bundle: Path, out: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of `bundle` with an edited manifest."""
    shutil.copytree(bundle, out)
    document = json.loads((out / "manifest.json").read_text())
    edit(document)
    (out / "manifest.json").write_text(json.dumps(document))
    return out


def without_decoder(bundle: Path, out: Path) -> Path:
    """A copy of `bundle` that ends with the embeddings."""

    def drop(document: dict[str, Any]) -> None:
        document["stages"] = [one for one in document["stages"] if one["contract"]["name"] != "llm"]

    return edited(bundle, out, drop)
