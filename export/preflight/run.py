"""Preflight of a whole bundle: every stage's graph, profiles at their corners, and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from ...bundle import Bundle
from ...errors import InputError
from ...manifest import StageRecord
from ...models.contract import StageContract
from ...runtime.tensorrt.versions import OLDEST, Version
from ..tensorrt.profiles import bundle_profiles
from . import devices as device_table
from .corners import CornerResult, Limits, StageRunner, corner_findings, free_memory
from .devices import BUNDLE, Device, find_device
from .findings import Finding, sort_findings
from .graph import check_graph
from .memory import StageMemory, check_memory, estimate_bundle, estimate_stage
from .profiles import check_axes, stage_corners
from .reference import CheckpointReference
from .report import PreflightReport

Progress = Callable[[str], None]
# One of each parser generation; any version in between is taken too.
VERSIONS = ("10.3", "10.13", "10.16", "11.4")
# Findings that the decoder's standard form, and FP32 around norms and softmax, repair.
DECODER_CHECKS = frozenset({"contrib", "operator", "opset", "attribute"})
ISLAND_CHECKS = frozenset({"fp16-norm", "fp16-softmax"})
DECODER_FIX = "write the decoder in operators of ai.onnx: quantise for --target tensorrt, or preflight --fix -o OUT"
_LAST_MINOR = {10: 16, 11: 4}
# Of the memory that is free, so that the machine stays usable.
_SHARE_OF_MEMORY = 0.7


def preflight(
    bundle: Bundle | str | Path,
    *,
    tensorrt: str = "10.3",
    device: str | Device | None = None,
    reference: str | Path | None = None,
    profiles: Sequence[str] = (),
    limits: Limits | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PreflightReport:
    """What would stop or hurt a build of `bundle` by TensorRT `tensorrt` (on `device`); no GPU, no TensorRT is needed.

    `reference`: checkpoint directory; corners are then compared with PyTorch too. `profiles`: as for `build`, each
    "batch=1,4,8 sequence=1,64,128"; without any, the contracts' own ranges. `limits`: of the corners' evaluation.

    Raises InputError for an unknown version or device and for a profile outside of a contract, CheckpointError for a
    `reference` that is none, BundleError for a bundle that cannot be read.
    """
    version = parse_version(tensorrt)
    board = find_device(device) if isinstance(device, str) else device
    if not isinstance(bundle, Bundle):
        bundle = Bundle.load(bundle)
    _check_format(bundle)
    bundle_profiles(bundle.manifest, profiles)
    compare_with = None if reference is None else CheckpointReference(bundle, reference)
    limits = limits or Limits(default_memory())
    say = progress or (lambda _: None)
    findings: list[Finding] = [] if board is None else list(_check_device(bundle, board, version))
    if compare_with is not None and compare_with.is_other:
        why = "its files are not those that the bundle names: where corners differ, it may be for that"
        findings.append(Finding("reference", "warning", BUNDLE, str(reference), why, "give what was exported"))
    corners: list[CornerResult] = []
    memory: list[StageMemory] = []
    for stage in bundle.manifest.stages:
        name, path = stage.contract.name, bundle.graph(stage.contract.name)
        say(f"{name}: reading the graph")
        findings += _check_stage(bundle, stage, path, version)
        say(f"{name}: estimating memory")
        memory.append(estimate_stage(stage, bundle.manifest, path, profiles))
        say(f"{name}: running the corners of its profiles")
        runner = StageRunner(
            stage,
            bundle.manifest,
            path,
            limits,
            peak=memory[-1].activations_max,
            weights=memory[-1].weights_total,
            reference=compare_with,
            threads=threads,
        )
        corners += runner.run(stage_corners(stage, bundle.manifest, profiles))
    findings += corner_findings(corners)
    estimate = estimate_bundle(memory, board)
    if board is not None:
        findings += check_memory(estimate, board)
    ordered = tuple(sort_findings(findings))
    return PreflightReport(str(bundle.path), str(version), board, ordered, tuple(corners), estimate)


def preflight_graph(path: str | Path, *, tensorrt: str = "10.3", device: str | None = None) -> PreflightReport:
    """What would stop or hurt a build of the ONNX file `path`, whoever wrote it.

    It has no contract, so no profiles are run and no memory is estimated. Raises InputError for an unknown version or
    device and for a file that is no ONNX model.
    """
    version, path = parse_version(tensorrt), Path(path)
    board = None if device is None else find_device(device)
    # Repairs are judged by a bundle's contracts.
    findings = [replace(one, fixable=False) for one in check_graph(path, None, version, stage=path.stem)]
    if board is not None:
        findings += device_table.check_version_on(board, version)
        findings += device_table.check_precisions(board, [(path.stem, kind) for kind in _types_of(path)])
    return PreflightReport(str(path), str(version), board, tuple(sort_findings(findings)), (), None)


def default_memory() -> int:
    """Bytes that the corners may take."""
    return int(free_memory() * _SHARE_OF_MEMORY)


def parse_version(text: str) -> Version:
    """A TensorRT version that the tables are about; InputError that lists them for any other."""
    version = Version.parse(text)
    if version < Version.parse(OLDEST) or version.minor > _LAST_MINOR.get(version.major, -1):
        raise InputError(
            f"TensorRT {text} is not known here; accepted are {', '.join(VERSIONS)}, and what lies between 10.3 and "
            "10.16 or 11.0 and 11.4"
        )
    return version


def is_decoder_to_rewrite(bundle: Bundle, stage: StageRecord) -> bool:
    """Whether the stage is a decoder of ONNX Runtime's operators, which has a standard form."""
    cache = bundle.manifest.kv_cache
    return stage.contract.name == "llm" and cache is not None and cache.shared_buffer


def _check_format(bundle: Bundle) -> None:
    for stage in bundle.manifest.stages:
        if not stage.file.endswith(".onnx"):
            raise InputError(
                f"{bundle.path}: stage {stage.contract.name} is {stage.file}, and preflight reads ONNX graphs; "
                "give the bundle that it was built from"
            )


def _check_stage(bundle: Bundle, stage: StageRecord, path: Path, version: Version) -> Iterator[Finding]:
    contract: StageContract = stage.contract
    rewritten = is_decoder_to_rewrite(bundle, stage)
    for finding in check_graph(path, contract, version, stage=contract.name):
        repaired = rewritten and finding.check in DECODER_CHECKS
        repaired = repaired or finding.check in ISLAND_CHECKS
        fix = DECODER_FIX if rewritten and finding.check in DECODER_CHECKS else finding.fix
        yield replace(finding, fix=fix, fixable=True) if repaired else finding
    yield from check_axes(stage, bundle.manifest, ir.load(path))


def _check_device(bundle: Bundle, device: Device, version: Version) -> Iterator[Finding]:
    yield from device_table.check_version_on(device, version)
    pairs = [(stage.contract.name, stage.precision) for stage in bundle.manifest.stages]
    yield from device_table.check_precisions(device, dict.fromkeys((*pairs, *_stored_types(bundle))))
    yield from device_table.check_reports(device, version, pairs)


def _stored_types(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """(stage, precision) for the types of weights that need hardware of their own."""
    for stage in bundle.manifest.stages:
        name = stage.contract.name
        yield from ((name, kind) for kind in _types_of(bundle.graph(name)))


def _types_of(path: Path) -> list[str]:
    kinds = {"bfloat16": "bf16", "int4": "int4", "float8e4m3fn": "fp8", "float4e2m1": "fp4"}
    model = ir.load(path)
    types = {value.dtype for value in model.graph.initializers.values() if value.dtype is not None}
    types |= {value.dtype for node in model.graph for value in node.outputs if value.dtype is not None}
    return [kinds[name] for name in sorted({dtype.name.lower() for dtype in types} & set(kinds))]


__all__ = [
    "BUNDLE",
    "VERSIONS",
    "default_memory",
    "is_decoder_to_rewrite",
    "parse_version",
    "preflight",
    "preflight_graph",
]
