"""A checkpoint directory to a bundle: every stage exported, checked on what was written, and recorded."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..bundle import Bundle, sha256, staged_directory, write_manifest
from ..errors import UnsupportedError
from ..manifest import CONFIG_FILE, CheckpointRecord, Manifest, StageRecord
from ..models import load_checkpoint
from ..models.contract import KvCacheContract, StageContract
from .attention_variant import OUTPUT as CROSS_ATTENTION
from .attention_variant import write_attention_variant
from .checks import Reference, check_equality, check_structure, make_references
from .disk import check_room, disk_full_as_os_error
from .graph import OPSET, trace_and_save
from .lint import lint_graphs
from .llm import export_llm
from .llm.check import check_decoder, make_ragged_batches
from .llm.export import decoder_shapes
from .memory import release_memory
from .options import check_libraries, check_options, toolchain
from .passes import PassResult
from .passes.axes import Dims
from .processor import freeze_generation, freeze_image_processor, freeze_prompt, freeze_tokenizer
from .processor_check import check_frozen_processor

if TYPE_CHECKING:
    from ..models.checkpoint import VisionLanguageModel

Progress = Callable[[str], None]

# Stage -> its graph in the bundle, in the order of the chain.
FILES = {
    "encoder": "encoder/model.onnx",
    "connector": "connector/model.onnx",
    "embed_tokens": "llm/embed_tokens.onnx",
    "llm": "llm/decoder.onnx",
}
ATTENTION_FILE = "connector/attention.onnx"


@dataclass(frozen=True)
class _Done:
    """One exported stage: its record and what its checks found."""

    record: StageRecord
    checks: dict[str, Any]


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    precision: str = "fp32",
    target: str = "cpu",
    calibration: str | Path | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export the checkpoint directory `checkpoint` to a bundle at `out`.

    ``precision``: "fp32", or "int4" for INT4 weights in the language model with the other stages in FP32.
    ``target``: "cpu". ``force``: replace a directory at `out`. ``progress`` is called with a line before each step.
    Nothing is left at or beside `out` unless everything succeeded.

    Raises UnsupportedError for a precision, target or architecture that is not built yet, CheckpointError for a
    checkpoint that cannot be read, ExportError for a graph that misses a check, OutputError when `out` cannot be
    written.
    """
    check_options(precision, target, calibration)
    check_libraries()
    say = progress or _say_nothing
    say("reading the checkpoint")
    model = load_checkpoint(checkpoint, allow_pickle=allow_pickle)
    cache = model.kv_cache
    if cache is None:
        raise UnsupportedError(
            f"{model.path}: {model.architecture} has no language model to generate with; accepted is "
            "Blip2ForConditionalGeneration"
        )
    with staged_directory(out, force=force, protect=(model.path,)) as staging, disk_full_as_os_error():
        check_room(model, staging)
        manifest = _write_bundle(model, cache, staging, precision, say)
    return Bundle(Path(out), manifest)


def _say_nothing(_: str) -> None:
    pass


def _write_bundle(
    model: VisionLanguageModel, cache: KvCacheContract, staging: Path, precision: str, say: Progress
) -> Manifest:
    say("freezing processor and tokenizer")
    image = freeze_image_processor(model.path, model.config)
    prompt = freeze_prompt(model.path, model.config)
    generation = freeze_generation(model.path, model.config)
    tokenizer = freeze_tokenizer(model.path, staging / "tokenizer", prompt.image_token_id)
    processor = check_frozen_processor(model.path, image, prompt, tokenizer)
    _keep_config(model, staging)
    stages = [
        _export_traced(model, name, staging, say, max_id=generation.vocab_size if name == "embed_tokens" else 2)
        for name in ("encoder", "connector", "embed_tokens")
    ]
    stages.append(_export_llm(model, cache, staging, precision, say))
    say("linting the graphs")
    _lint(stages, staging)
    say("hashing the bundle")
    manifest = Manifest(
        bridgeport_version=__version__,
        model_kind=model.kind,
        target="cpu",
        checkpoint=_describe_checkpoint(model),
        stages=tuple(stage.record for stage in stages),
        kv_cache=cache,
        image=image,
        prompt=prompt,
        generation=generation,
        tokenizer=tokenizer.relative_to(staging).as_posix(),
        checks={
            "export": {"stages": {stage.record.contract.name: stage.checks for stage in stages}, "processor": processor}
        },
    )
    return write_manifest(staging, manifest)


def _keep_config(model: VisionLanguageModel, staging: Path) -> None:
    """The checkpoint's config beside the graphs: benchmarks build PyTorch's model of the same sizes from it."""
    kept = staging / CONFIG_FILE
    kept.parent.mkdir()
    shutil.copyfile(model.path / kept.name, kept)


def _export_traced(model: VisionLanguageModel, name: str, staging: Path, say: Progress, *, max_id: int) -> _Done:
    """Export one stage that torch.onnx traces; its PyTorch module is gone before ONNX Runtime loads the graph."""
    contract, path = model.contracts[name], staging / FILES[name]
    say(f"{name}: running PyTorch")
    module = model.load_stage(name)
    references, layer_norms = make_references(module, contract, max_id=max_id)
    variant = _attention_references(module, references) if name == "connector" else []
    say(f"{name}: exporting")
    passes = trace_and_save(module, contract, path, max_id=max_id)
    del module
    release_memory()
    say(f"{name}: checking")
    shapes = contract_shapes(contract)
    checks = check_structure(path, shapes, stage=name, opset=OPSET, layer_norms=layer_norms, standard=True)
    checks["onnxruntime"] = check_equality(path, references, stage=name, output=contract.outputs[0].name)
    checks["passes"] = _texts(passes)
    record = StageRecord(contract=contract, file=FILES[name], precision="fp32", opset=OPSET, toolchain=_toolchain())
    if name == "connector":
        checks["attention"] = _export_attention(path, staging / ATTENTION_FILE, shapes, variant, layer_norms)
        record = record.model_copy(update={"variants": {"attention": ATTENTION_FILE}})
    release_memory()
    return _Done(record, checks)


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


def _export_llm(
    model: VisionLanguageModel, cache: KvCacheContract, staging: Path, precision: str, say: Progress
) -> _Done:
    contract, path = model.contracts["llm"], staging / FILES["llm"]
    say(f"llm: exporting ({precision})")
    graph = export_llm(model, contract, path, precision=precision)
    release_memory()
    say("llm: running PyTorch")
    llm = model.load_stage("llm")
    context = model.config.text_config.max_position_embeddings
    batches = make_ragged_batches(llm, context, decoder=path if precision == "int4" else None)
    del llm
    release_memory()
    say("llm: checking")
    shapes = decoder_shapes(contract, cache)
    checks = check_structure(path, shapes, stage="llm", opset=graph.opset, layer_norms=None, standard=False)
    checks["onnxruntime"] = check_decoder(path, batches, cache, precision=precision)
    checks["passes"] = _texts(graph.passes)
    checks["builder"] = graph.builder
    release_memory()
    record = StageRecord.model_validate(
        {
            "contract": contract,
            "file": FILES["llm"],
            "precision": precision,
            "opset": graph.opset,
            "toolchain": _toolchain(),
        }
    )
    return _Done(record, checks)


def _lint(stages: list[_Done], staging: Path) -> None:
    """Lint all graphs of standard operators; results go into the stages' checks."""
    scratch = staging / ".lint"
    scratch.mkdir()
    graphs: dict[str, Path] = {
        stage.record.contract.name: staging / stage.record.file for stage in stages if "operators" in stage.checks
    }
    graphs["connector-attention"] = staging / ATTENTION_FILE
    try:
        results = lint_graphs(graphs, scratch)
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


def contract_shapes(contract: StageContract) -> dict[str, Dims]:
    """Name -> shape of the contract's inputs and outputs."""
    return {spec.name: spec.shape for spec in (*contract.inputs, *contract.outputs)}


def _texts(passes: tuple[PassResult, ...]) -> dict[str, str]:
    return {result.name: result.as_text() for result in passes}


def _toolchain() -> dict[str, str]:
    return {"python": platform.python_version(), **toolchain()}


def _describe_checkpoint(model: VisionLanguageModel) -> CheckpointRecord:
    return CheckpointRecord(
        architecture=model.architecture,
        model_type=model.config.model_type,
        text_model_type=model.config.text_config.model_type,
        sha256={file.name: sha256(file) for file in model.files},
    )
