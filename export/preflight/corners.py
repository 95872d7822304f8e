"""A stage really run at the corners of its profiles, by ONNX Runtime on the CPU.

At each corner: it runs, the outputs have the contract's shapes and are finite, each of the first and last row of a
batch equals the same row alone, and all equal PyTorch where a checkpoint is given. What memory or time does not allow
is told, and the largest batch that they allow is run in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...manifest import Manifest, StageRecord
from ...models.contract import TensorSpec
from ...runtime.parity.gates import FP32_LOGITS
from ...runtime.parity.metrics import Difference, Gate, compare, worst_of
from .feeds import Feed, make_feed, shape_of, slice_row
from .findings import Finding
from .profiles import BATCH, Corner, input_specs, output_specs

Status = Literal["passed", "failed", "skipped"]
# Feed and sizes -> PyTorch's outputs by name, or None where there is nothing to compare with.
Reference = Callable[[str, Feed, Mapping[str, int]], dict[str, NDArray[Any]] | None]
# A row alone runs through kernels of other shapes, so FP32 differs by the order of sums, FP16 by its rounding, and a
# quantised graph by a step where rounding turned. Rows that are mixed up or a size that was baked in are of the order
# of the values themselves.
GATES: dict[str, Gate] = {
    "fp32": FP32_LOGITS,
    "fp16": Gate(max_abs=5e-2, mean_abs=5e-3, min_token_cosine=1 - 1e-3),
}
_QUANTIZED = Gate(max_abs=1.0, mean_abs=5e-2, min_token_cosine=0.98)
# What ONNX Runtime takes over the liveness of a graph: its arena, and outputs that are copied.
_OVERHEAD = 1.5


@dataclass(frozen=True)
class Limits:
    """What evaluation may take: bytes of memory, and seconds for all corners of one stage."""

    memory: int
    seconds: float = 60.0


@dataclass(frozen=True)
class CornerResult:
    """What came of one corner. `note`: why it failed or was skipped. `batched`, `reference`: the largest difference
    relative to the RMS of the value, None where nothing was compared; `reduced`: stands for a corner that was skipped.
    """

    stage: str
    profile: str
    sizes: Mapping[str, int]
    status: Status
    seconds: float = 0.0
    note: str = ""
    batched: float | None = None
    reference: float | None = None
    reduced: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON values; an infinite difference is null, and `note` says why."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("batched", "reference"):
            found[name] = found[name] if found[name] is None or np.isfinite(found[name]) else None
        return {**found, "sizes": dict(self.sizes), "seconds": round(self.seconds, 4)}


@dataclass
class StageRunner:
    """One stage, opened once. `peak`: bytes of its activations at the largest corner, `weights`: of its weights."""

    stage: StageRecord
    manifest: Manifest
    path: Path
    limits: Limits
    peak: int
    weights: int
    reference: Reference | None = None
    threads: int | None = None
    _session: Any = None
    _left: float = field(default=0.0)

    def run(self, corners: Sequence[Corner]) -> list[CornerResult]:
        """Results in the order of `corners`, the smallest first; one for a reduced batch at the end."""
        name = self.stage.contract.name
        if self.weights * _OVERHEAD > self.limits.memory:
            note = f"its weights take {_gb(self.weights)} and {_gb(self.limits.memory)} are free here"
            return [CornerResult(name, one.profile, one.sizes, "skipped", note=note) for one in corners]
        try:
            self._session = open_session(self.path, self.threads)
        except Exception as error:  # noqa: BLE001 - onnxruntime raises classes of its own
            note = f"ONNX Runtime does not load it: {_first_line(error)}"
            return [CornerResult(name, one.profile, one.sizes, "failed", note=note) for one in corners[:1]]
        self._left = self.limits.seconds
        results: list[CornerResult] = []
        for corner in corners:
            results.append(self._run_one(corner, corners[-1], results))
        skipped = [corner for corner, one in zip(corners, results, strict=True) if one.status == "skipped"]
        if skipped:
            results += self._run_reduced(skipped[-1], corners[-1], results)
        self._session = None
        return results

    def _run_one(self, corner: Corner, largest: Corner, done: Sequence[CornerResult]) -> CornerResult:
        name = self.stage.contract.name
        reason = self._too_much(corner, largest, done)
        if reason is not None:
            return CornerResult(name, corner.profile, corner.sizes, "skipped", note=reason)
        started = time.perf_counter()
        result = self._evaluate(corner)
        took = time.perf_counter() - started
        self._left -= took
        return replace(result, seconds=took)

    def _run_reduced(self, corner: Corner, largest: Corner, done: Sequence[CornerResult]) -> list[CornerResult]:
        """The skipped corner with half the batch, and half of that, until one can be run and none is left."""
        seen = {tuple(sorted(one.sizes.items())) for one in done}
        batch = corner.sizes.get(BATCH, 1) // 2
        while batch >= 1:
            smaller = Corner(corner.profile, {**corner.sizes, BATCH: batch})
            if tuple(sorted(smaller.sizes.items())) in seen:
                break
            if self._too_much(smaller, largest, done) is None:
                return [replace(self._run_one(smaller, largest, done), reduced=True)]
            batch //= 2
        return []

    def _too_much(self, corner: Corner, largest: Corner, done: Sequence[CornerResult]) -> str | None:
        """Why the corner is not run: what it takes grows at least as its inputs do."""
        own = self._elements(corner.sizes)
        share = min(1.0, own / max(1, self._elements(largest.sizes)))
        need = int((self.peak * share + self.weights) * _OVERHEAD)
        if need > self.limits.memory:
            return f"it would take about {_gb(need)} and {_gb(self.limits.memory)} are free here"
        timed = [one for one in done if one.status == "passed"]
        if timed:
            last = timed[-1]
            expected = last.seconds * max(1.0, own / max(1, self._elements(last.sizes)))
            if expected > self._left:
                return f"it would take about {expected:.0f} s and {max(0.0, self._left):.0f} s of the limit are left"
        return None

    def _elements(self, sizes: Mapping[str, int]) -> int:
        return sum(int(np.prod(shape_of(spec, sizes))) for spec in self._specs)

    @property
    def _specs(self) -> tuple[TensorSpec, ...]:
        return input_specs(self.stage, self.manifest)

    def _evaluate(self, corner: Corner) -> CornerResult:
        name, sizes = self.stage.contract.name, corner.sizes
        feed = make_feed(self._specs, sizes, seed=1)
        bare = CornerResult(name, corner.profile, sizes, "passed")
        try:
            outputs = self._compute(feed)
            wrong = self._wrong(outputs, sizes)
            if wrong is not None:
                return replace(bare, status="failed", note=wrong)
            batched = self._against_rows(feed, outputs, sizes)
            reference = self._against_reference(feed, outputs, sizes)
        except Exception as error:  # noqa: BLE001 - onnxruntime and torch raise classes of their own
            return replace(bare, status="failed", note=f"it does not run: {_first_line(error)}")
        return self._judge(bare, batched, reference)

    def _judge(self, bare: CornerResult, batched: Difference | None, reference: Difference | None) -> CornerResult:
        gate = GATES.get(self.stage.precision, _QUANTIZED)
        notes = []
        for found, what in ((batched, "the same row alone"), (reference, "PyTorch")):
            if found is not None and gate.broken(found):
                more = found.note or f"{found.max_rel:.3g} of the RMS, at {list(found.where)}"
                notes.append(f"differs from {what} by {more}")
        return replace(
            bare,
            status="failed" if notes else "passed",
            note="; ".join(notes),
            batched=None if batched is None else batched.max_rel,
            reference=None if reference is None else reference.max_rel,
        )

    def _compute(self, feed: Feed) -> Feed:
        names = [spec.name for spec in output_specs(self.stage, self.manifest)]
        return dict(zip(names, self._session.run(names, feed), strict=True))

    def _wrong(self, outputs: Feed, sizes: Mapping[str, int]) -> str | None:
        """None for outputs with the contract's shapes and finite numbers."""
        for spec in output_specs(self.stage, self.manifest):
            array = outputs[spec.name]
            known = _with_patches(self.stage, sizes)
            wanted = [dim if isinstance(dim, int) else known.get(dim) for dim in spec.shape]
            if len(wanted) != array.ndim or any(w not in (None, g) for w, g in zip(wanted, array.shape, strict=True)):
                return f"{spec.name} is {list(array.shape)}, the contract has {list(spec.shape)}: a size was baked in"
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                where = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
                return f"{spec.name} holds {array[tuple(where)]} at {where}"
        return None

    def _against_rows(self, feed: Feed, outputs: Feed, sizes: Mapping[str, int]) -> Difference | None:
        batch = sizes.get(BATCH, 1)
        axes = {axis.name: axis for axis in self.stage.contract.axes}
        if batch < 2 or BATCH not in axes or axes[BATCH].min > 1:
            return None
        found = []
        for row in (0, batch - 1):
            alone = self._compute(slice_row(feed, self._specs, row))
            for spec in self.stage.contract.outputs:
                if BATCH in spec.shape:
                    own = np.take(outputs[spec.name], [row], axis=spec.shape.index(BATCH))
                    found.append(compare(_real(alone[spec.name]), _real(own)))
        return worst_of(found) if found else None

    def _against_reference(self, feed: Feed, outputs: Feed, sizes: Mapping[str, int]) -> Difference | None:
        expected = None if self.reference is None else self.reference(self.stage.contract.name, feed, sizes)
        if not expected:
            return None
        return worst_of([compare(_real(expected[name]), _real(outputs[name])) for name in expected])


def corner_findings(results: Sequence[CornerResult]) -> Iterator[Finding]:
    """An error for each failure, one warning for what a stage was not run at."""
    for one in results:
        if one.status == "failed":
            node = Corner(one.profile, one.sizes).label()
            fix = "export the stage again with these sizes dynamic, or take them out of the profile (--profile)"
            yield Finding("corner", "error", one.stage, node, one.note, fix)
    for stage in dict.fromkeys(one.stage for one in results):
        own = [one for one in results if one.stage == stage]
        skipped = [one for one in own if one.status == "skipped"]
        if skipped:
            last = skipped[-1]
            instead = [Corner(one.profile, one.sizes).label() for one in own if one.reduced and one.status == "passed"]
            why = f"{len(skipped)} of {len(own) - len(instead)} corners were not run here: {last.note}"
            why += f"; {instead[0]} was run and passed" if instead else ""
            fix = "run it where there is more memory, allow more time (--seconds), or give a smaller --profile"
            yield Finding("corner", "warning", stage, Corner(last.profile, last.sizes).label(), why, fix)


def open_session(path: Path, threads: int | None = None) -> Any:
    """A session for a few runs: no second copy of the weights, and memory goes back after each run."""
    from ...runtime.onnxruntime.loader import import_onnxruntime

    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Pairs of Q/DQ are computed as they are written: FP8 ones would be fused as if they were INT8, and not load.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def free_memory() -> int:
    """Bytes that this process can still take: what the kernel calls available, within its control group."""
    found = [4 << 30]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        rows = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        found = [int(rows.get("MemAvailable", "4194304 kB").split()[0]) * 1024]
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and used.is_file():
        text = limit.read_text(encoding="utf-8").strip()
        if text.isdigit():
            found.append(max(0, int(text) - int(used.read_text(encoding="utf-8"))))
    return min(found)


def _with_patches(stage: StageRecord, sizes: Mapping[str, int]) -> dict[str, int]:
    """`sizes` and those of axes that outputs alone have."""
    found = dict(sizes)
    for axis in stage.contract.axes:
        if axis.patches is not None and axis.name not in found:
            high, wide = (sizes[edge] // axis.patches.size for edge in axis.patches.edges)
            found[axis.name] = high * wide
    return found


def _real(array: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(array, np.float32)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:240]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
