"""`preflight --fix`: a bundle with what can be repaired, each stage held against the one that it was made from."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from ..._wire import external_data_locations
from ...bundle import Bundle, check_output, staged_directory, write_manifest
from ...errors import EngineError, ExportError, UnsupportedError
from ...manifest import Manifest, StageRecord, Target
from ...models.contract import StageContract
from ...models.flamingo_contract import IMAGE_SEQUENCE
from ...runtime.backends import EngineOptions
from ...runtime.onnxruntime import load_engine
from ...runtime.parity.metrics import Difference, compare, worst_of
from ..attention_variant import write_attention_variant
from ..graph import save_graph
from ..memory import release_memory
from ..passes import apply_passes
from ..passes.standard_decoder import OPSET, write_standard_decoder
from ..tensorrt.build import check_buildable
from ..tensorrt.graphs import copy_graphs
from ..tensorrt.profiles import IMAGES, PAST
from .corners import GATES, open_session
from .feeds import make_feed
from .findings import Finding, sort_findings
from .profiles import BATCH, TOKENS, TOTAL, input_specs
from .repairs import repair_passes
from .report import PreflightReport
from .run import DECODER_CHECKS, Progress, is_decoder_to_rewrite, preflight

_PROMPT = 6
_ATTENTION = "attention"


@dataclass(frozen=True)
class Repair:
    """What was done to a stage. `max_rel`: its largest difference from before, relative to the RMS of the output, None
    where nothing could be compared; `note`: why it was left as it was.
    """

    stage: str
    what: str
    status: Literal["repaired", "declined"]
    max_rel: float | None = None
    note: str = ""


@dataclass(frozen=True)
class FixReport:
    """`before` and `after` are preflight of the two bundles; what `after` finds is for a person to repair."""

    bundle: str
    repairs: tuple[Repair, ...]
    before: PreflightReport
    after: PreflightReport

    def solved(self) -> tuple[Finding, ...]:
        """Findings that are gone: no finding of this check is left in this stage."""
        left = {(one.stage, one.check) for one in self.after.findings}
        return tuple(one for one in self.before.findings if (one.stage, one.check) not in left)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "bundle": self.bundle,
            "passed": self.after.passed,
            "repairs": [vars(one) for one in self.repairs],
            "before": self.before.to_json(),
            "after": self.after.to_json(),
        }


def fix_bundle(
    bundle: Bundle | str | Path,
    out: str | Path,
    *,
    tensorrt: str = "10.3",
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> FixReport:
    """Write a repaired copy of `bundle` to `out` and run preflight on both; `options` as for `preflight`.

    A stage whose repair does not give the numbers of before is left as it was, and the report says so. `out` is written
    as a whole or not at all. Raises what `preflight` does, and OutputError when `out` cannot be written.
    """
    say = progress or (lambda _: None)
    if not isinstance(bundle, Bundle):
        bundle = Bundle.load(bundle)
    check_output(out, force=force, protect=(bundle.path,))
    options = {**options, "tensorrt": tensorrt, "threads": threads, "progress": progress}
    before = preflight(bundle, **options)
    checks = {(one.stage, one.check) for one in before.findings if one.fixable}
    with staged_directory(out, force=force, protect=(bundle.path,)) as staging:
        manifest, repairs = copy_graphs(bundle, staging), []
        for stage in manifest.stages:
            own = {check for name, check in checks if name == stage.contract.name}
            if own:
                say(f"{stage.contract.name}: repairing")
                manifest, done = _Stage(bundle, stage, staging, threads).repair(manifest, own)
                repairs += done
        notes = {"preflight_fix": [vars(one) for one in repairs]}
        manifest = manifest.model_copy(update={"checks": {**manifest.checks, **notes}})
        target = _target(Bundle(staging, manifest))
        fixed = Bundle(staging, write_manifest(staging, manifest.model_copy(update={"target": target})))
        after = preflight(fixed, **options)
        after = replace(after, bundle=str(out), findings=_with_declined(after.findings, repairs))
    return FixReport(str(out), tuple(repairs), before, after)


def _with_declined(findings: Sequence[Finding], repairs: Sequence[Repair]) -> tuple[Finding, ...]:
    declined = [
        Finding(
            "fix", "warning", one.stage, one.what, f"left as it was: {one.note}", "repair it by hand, or export again"
        )
        for one in repairs
        if one.status == "declined"
    ]
    return tuple(sort_findings([*findings, *declined]))


def _target(fixed: Bundle) -> Target:
    """Whom the graphs are for now: TensorRT, unless it still cannot read one, or one was quantised for another."""
    try:
        check_buildable(fixed)
    except UnsupportedError:
        return fixed.manifest.target
    return "tensorrt"


@dataclass(frozen=True)
class _Stage:
    """One stage under repair."""

    source: Bundle
    record: StageRecord
    staging: Path
    threads: int | None

    @property
    def name(self) -> str:
        return self.record.contract.name

    def repair(self, manifest: Manifest, checks: set[str]) -> tuple[Manifest, list[Repair]]:
        """The manifest with the stage's new record, and what was done."""
        repairs: list[Repair] = []
        if checks & DECODER_CHECKS and is_decoder_to_rewrite(self.source, self.record):
            manifest, one = self._rewrite_decoder(manifest)
            repairs.append(one)
            if one.status == "repaired":
                checks = checks - {"operator-dtype"}  # done on the way
        if checks - DECODER_CHECKS:
            repairs.append(self._apply_passes(manifest))
        return manifest, repairs

    def _rewrite_decoder(self, manifest: Manifest) -> tuple[Manifest, Repair]:
        what = f"decoder of ai.onnx operators, opset {OPSET}, cache concatenated"
        cache = None if manifest.kv_cache is None else manifest.kv_cache.model_copy(update={"shared_buffer": False})
        record = self.record.model_copy(update={"opset": OPSET})
        changed = manifest.model_copy(update={"kv_cache": cache, "stages": _replaced(manifest, record)})

        def judge(graph: Path) -> Difference:
            return _compare_decoders(self.source, _bundle_of(self.source, changed, graph, self.name), self.threads)

        one = self._attempt(what, lambda graph: write_standard_decoder(self.staging / self.record.file, graph), judge)
        return (changed if one.status == "repaired" else manifest), one

    def _apply_passes(self, manifest: Manifest) -> Repair:
        what: list[str] = []

        def write(graph: Path) -> None:
            model, results = apply_passes(ir.load(self.staging / self.record.file), repair_passes(), stage=self.name)
            what.extend(one.name for one in results if one.changed)
            if not what:
                raise ExportError("; ".join(f"{one.name}: {one.declined}" for one in results if one.declined))
            save_graph(model, graph)
            del model
            release_memory()

        def judge(graph: Path) -> Difference:
            return _compare_graphs(self.record, manifest, self.staging / self.record.file, graph, self.threads)

        one = self._attempt("", write, judge)
        return replace(one, what=", ".join(what) or "graph passes")

    def _attempt(self, what: str, write: Callable[[Path], Any], judge: Callable[[Path], Difference]) -> Repair:
        """Write the new graph aside, hold it against the old one, and only then put it in its place."""
        target = self.staging / self.record.file
        with tempfile.TemporaryDirectory(dir=self.staging.parent, prefix=f".{self.staging.name}.") as work:
            graph = Path(work) / target.name
            try:
                write(graph)
                found = judge(graph)
            except (ExportError, EngineError) as error:
                return Repair(self.name, what, "declined", note=str(error))
            gate = GATES.get(self.record.precision, GATES["fp16"])
            if gate.broken(found):
                note = found.note or f"the outputs differ by {found.max_rel:.3g} of their RMS"
                return Repair(self.name, what, "declined", note=note)
            self._install(graph, target)
        return Repair(self.name, what, "repaired", max_rel=found.max_rel)

    def _install(self, graph: Path, target: Path) -> None:
        variants = [self.staging / file for file in self.record.variants.values()]
        for location in external_data_locations(target):
            if not self._shared(location, target):
                (target.parent / location).unlink(missing_ok=True)
        for file in (graph, *(graph.parent / location for location in external_data_locations(graph))):
            shutil.move(file, target.parent / file.name)
        for purpose, variant in zip(self.record.variants, variants, strict=True):
            if purpose == _ATTENTION:
                write_attention_variant(target, variant)

    def _shared(self, location: str, target: Path) -> bool:
        """Whether another stage's graph has its weights in the same file."""
        file = (target.parent / location).resolve()
        others = [self.staging / one.file for one in self.source.manifest.stages if one.contract.name != self.name]
        return any(
            (other.parent / where).resolve() == file for other in others for where in external_data_locations(other)
        )


def _replaced(manifest: Manifest, record: StageRecord) -> tuple[StageRecord, ...]:
    return tuple(record if one.contract.name == record.contract.name else one for one in manifest.stages)


@dataclass(frozen=True)
class _Candidate(Bundle):
    """A bundle whose one stage has its graph elsewhere."""

    graph_file: Path = Path()
    stage_name: str = ""

    def graph(self, stage: str, variant: str | None = None) -> Path:
        """As `Bundle.graph`."""
        return self.graph_file if stage == self.stage_name else super().graph(stage, variant)


def _bundle_of(source: Bundle, manifest: Manifest, graph: Path, stage: str) -> Bundle:
    return _Candidate(source.path, manifest, graph, stage)


def _compare_graphs(record: StageRecord, manifest: Manifest, old: Path, new: Path, threads: int | None) -> Difference:
    """Outputs of two graphs on the same inputs: two rows, small sizes."""
    contract = record.contract
    sizes = _small_sizes(contract, manifest)
    if TOTAL in sizes:
        sizes.update({PAST: 0, TOTAL: sizes[TOKENS]})
    feed = make_feed(input_specs(record, manifest), sizes, seed=3)
    names = [spec.name for spec in contract.outputs]
    found = [open_session(path, threads).run(names, feed) for path in (old, new)]
    pairs = zip(*found, strict=True)
    return worst_of([compare(np.asarray(one, np.float32), np.asarray(two, np.float32)) for one, two in pairs])


def _small_sizes(contract: StageContract, manifest: Manifest) -> dict[str, int]:
    """Two rows, and four of everything else as far as the contract takes it."""
    sizes = {axis.name: min(max(2 if axis.name == BATCH else 4, axis.min), axis.max) for axis in contract.axes}
    if manifest.flamingo is not None and IMAGES in sizes and IMAGE_SEQUENCE in sizes:
        sizes[IMAGE_SEQUENCE] = sizes[IMAGES] * manifest.flamingo.latents
    return sizes


def _compare_decoders(old: Bundle, new: Bundle, threads: int | None) -> Difference:
    """Logits after a prefill of two rows of different length, and after one more token."""
    results = [_decode(bundle, threads) for bundle in (old, new)]
    return worst_of([compare(one, two) for one, two in zip(*results, strict=True)])


def _decode(bundle: Bundle, threads: int | None) -> list[Any]:
    engine = load_engine(bundle, "llm", EngineOptions(threads=threads))
    contract = engine.contract
    length = max(1, min(_PROMPT, contract.axis(TOTAL).max - 1, contract.axis(TOKENS).max))
    rows = min(2, contract.axis(BATCH).max)
    sizes = {**_small_sizes(contract, bundle.manifest), BATCH: rows, TOKENS: length, TOTAL: length}
    cache = engine.allocate_cache(rows, length + 1)
    prompt = make_feed(contract.inputs, sizes, seed=5)
    found = [engine.run(prompt, cache=cache)["logits"]]
    step = make_feed(contract.inputs, {**sizes, TOKENS: 1, TOTAL: length + 1}, seed=7)
    lengths = prompt["attention_mask"].sum(1)
    step["attention_mask"] = (np.arange(length + 1) < (lengths + 1)[:, None]).astype(np.int64)
    step["logits_position"] = np.zeros(rows, np.int64)
    found.append(engine.run(step, cache=cache)["logits"])
    engine.close()
    return [np.asarray(logits, np.float32) for logits in found]
