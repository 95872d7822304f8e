"""One stage of a checkpoint to its graph in the bundle: traced or built, checked on what was written, recorded."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..manifest import StageRecord
from ..models.contract import KvCacheContract, StageContract
from .attention_variant import OUTPUT as CROSS_ATTENTION
from .attention_variant import write_attention_variant
from .checks import Reference, check_equality, check_structure, make_references
from .graph import OPSET, trace_and_save
from .lint import lint_graphs
from .llm import export_llm
from .llm.check import check_decoder, make_ragged_batches
from .llm.export import LlmGraph, decoder_shapes
from .memory import release_memory
from .options import toolchain
from .passes import PassResult
from .passes.axes import Dims

if TYPE_CHECKING:
    from ..models.checkpoint import VisionLanguageModel

Progress = Callable[[str], None]

ATTENTION_FILE = "connector/attention.onnx"
# The language model's graphs lie together; every other stage has a folder of its name.
_FILES = {"embed_tokens": "llm/embed_tokens.onnx", "llm": "llm/decoder.onnx"}


def stage_file(name: str) -> str:
    """Where the graph of the stage `name` is in the bundle."""
    return _FILES.get(name, f"{name}/model.onnx")


@dataclass(frozen=True)
class ExportedStage:
    """One exported stage: its record and what its checks found."""

    record: StageRecord
    checks: dict[str, Any]


def export_traced(model: VisionLanguageModel, name: str, staging: Path, say: Progress, *, max_id: int) -> ExportedStage:
    """Export one stage that torch.onnx traces; its PyTorch module is gone before ONNX Runtime loads the graph."""
    contract, path = model.contracts[name], staging / stage_file(name)
    say(f"{name}: running PyTorch")
    module, stage = model.load_stage(name), model.layout.stages[name]
    options: dict[str, Any] = {"max_id": max_id, "examples": stage.examples}
    references, layer_norms = make_references(module, contract, **options)
    variant = _attention_references(module, references) if hasattr(module, "with_attention") else []
    vectors = _write_vectors(module, stage.vectors, path.parent)
    say(f"{name}: exporting")
    passes = trace_and_save(module, contract, path, **options)
    del module
    release_memory()
    say(f"{name}: checking")
    shapes = contract_shapes(contract)
    checks = check_structure(path, shapes, stage=name, opset=OPSET, layer_norms=layer_norms, standard=True)
    checks["onnxruntime"] = check_equality(path, references, stage=name, output=contract.outputs[0].name)
    checks["passes"] = _texts(passes)
    record = StageRecord(
        contract=contract,
        file=stage_file(name),
        precision="fp32",
        opset=OPSET,
        toolchain=_toolchain(),
        vectors={name: file.relative_to(staging).as_posix() for name, file in vectors.items()},
    )
    if variant:
        checks["attention"] = _export_attention(path, staging / ATTENTION_FILE, shapes, variant, layer_norms)
        record = record.model_copy(update={"variants": {"attention": ATTENTION_FILE}})
    release_memory()
    return ExportedStage(record, checks)


def _write_vectors(module: Any, names: tuple[str, ...], directory: Path) -> dict[str, Path]:
    """Learned vectors that the run time places, as .npy files; name -> file."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {name: directory / f"{name}.npy" for name in names}
    for name, file in files.items():
        np.save(file, getattr(module, name).detach().numpy())
    return files


def _attention_references(module: Any, references: list[Reference]) -> list[Reference]:
    import torch

    found = []
    with torch.inference_mode():
        for reference in references:
            inputs = [torch.from_numpy(array) for array in reference.inputs.values()]
            found.append(Reference(reference.inputs, module.with_attention(*inputs)[1].numpy()))
    return found


def _export_attention(
    path: Path, out: Path, shapes: dict[str, Dims], references: list[Reference], layer_norms: int
) -> dict[str, Any]:
    passes = write_attention_variant(path, out)
    wanted: dict[str, Dims] = {**shapes, CROSS_ATTENTION: ("batch", *references[0].output.shape[1:])}
    stage = "connector (attention)"
    checks = check_structure(out, wanted, stage=stage, opset=OPSET, layer_norms=layer_norms, standard=True)
    checks["onnxruntime"] = check_equality(out, references, stage=stage, output=CROSS_ATTENTION)
    checks["passes"] = _texts(passes)
    return checks


def export_decoder(
    model: VisionLanguageModel, cache: KvCacheContract, staging: Path, precision: str, say: Progress
) -> ExportedStage:
    """Export the language model of one decoder, and hold it against PyTorch."""
    contract, path = model.contracts["llm"], staging / stage_file("llm")
    say(f"llm: exporting ({precision})")
    graph = export_llm(model, contract, path, precision=precision)
    release_memory()
    say("llm: running PyTorch")
    llm = model.load_stage("llm")
    context = contract.axis("total_sequence").max
    batches = make_ragged_batches(llm, context, decoder=path if precision == "int4" else None)
    del llm
    release_memory()
    say("llm: checking")
    equality = check_decoder(path, batches, cache, precision=precision)
    release_memory()
    return record_built_stage(model, "llm", path, graph, equality, precision)


def record_built_stage(
    model: VisionLanguageModel, name: str, path: Path, graph: LlmGraph, equality: dict[str, Any], precision: str
) -> ExportedStage:
    """The record of a part of the language model, whose graph lies at `path`; its structure is checked.

    ``equality``: what comparing it with PyTorch found. Raises ExportError for a graph that misses a check.
    """
    contract = model.contracts[name]
    cache = model.kv_cache if name == "llm" else None
    shapes = contract_shapes(contract) if cache is None else decoder_shapes(contract, cache)
    standard = cache is None and precision == "fp32"
    checks = check_structure(path, shapes, stage=name, opset=graph.opset, layer_norms=None, standard=standard)
    checks["onnxruntime"] = equality
    checks["passes"] = _texts(graph.passes)
    checks["builder"] = graph.builder
    record = {
        "contract": contract,
        "file": stage_file(name),
        "precision": precision,
        "opset": graph.opset,
        "toolchain": _toolchain(),
    }
    return ExportedStage(StageRecord.model_validate(record), checks)


def lint_stages(stages: list[ExportedStage], staging: Path) -> None:
    """Lint all graphs of standard operators; results go into the stages' checks."""
    scratch = staging / ".lint"
    scratch.mkdir()
    graphs: dict[str, Path] = {
        stage.record.contract.name: staging / stage.record.file for stage in stages if "operators" in stage.checks
    }
    if (staging / ATTENTION_FILE).exists():
        graphs["connector-attention"] = staging / ATTENTION_FILE
    try:
        results = lint_graphs(graphs, scratch, _least_sizes(stages))
    finally:
        for file in scratch.iterdir():
            file.unlink()
        scratch.rmdir()
    for stage in stages:
        name = stage.record.contract.name
        if name in results:
            stage.checks["polygraphy_lint"] = results[name]
        if "attention" in stage.checks:
            stage.checks["attention"]["polygraphy_lint"] = results["connector-attention"]


def _least_sizes(stages: list[ExportedStage]) -> dict[str, dict[str, int]]:
    """Stage -> axis -> size, for axes that are never 1."""
    contracts = [stage.record.contract for stage in stages]
    return {contract.name: {axis.name: axis.min for axis in contract.axes if axis.min > 1} for contract in contracts}


def contract_shapes(contract: StageContract) -> dict[str, Dims]:
    """Name -> shape of the contract's inputs and outputs."""
    return {spec.name: spec.shape for spec in (*contract.inputs, *contract.outputs)}


def _texts(passes: tuple[PassResult, ...]) -> dict[str, str]:
    return {result.name: result.as_text() for result in passes}


def _toolchain() -> dict[str, str]:
    return {"python": platform.python_version(), **toolchain()}
