"""Which INT8 scheme a CPU runs fastest, found by running all of them on the stage's own inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from numpy.typing import NDArray

from ..errors import InputError
from ..runtime.onnxruntime.loader import Device, import_onnxruntime, load_session
from ..runtime.parity.metrics import compare
from ..speed_hint import SATURATING, SpeedHint, best_instruction_set, processor
from .placement.cpu import CPU_SCHEMES, known_scheme, quantize_cpu
from .records import TensorRange

Feed = Mapping[str, NDArray[Any]]
Run = Callable[[Feed], Mapping[str, NDArray[Any]]]
FLOAT32 = "fp32"
# Rounds of side-by-side timing; each calls every graph once unmeasured and once measured.
ROUNDS = 7
# Samples over which a scheme's accuracy is judged; the gate looks at more, on pictures that calibration has not seen.
SAMPLES = 4
# Within a round a graph is called for this long, and at least once: the fastest call counts.
_CALL_MILLISECONDS, _MOST_CALLS = 20.0, 50
# Schemes that are this close to the fastest count as equally fast; the most exact of them is taken.
_TIE = 0.97
# A pool whose threads still spin would be timed as part of the next graph.
_SETTLE_SECONDS = 0.02


@dataclass(frozen=True)
class CpuCandidate:
    """One scheme as measured. `ratio`: median over the rounds of FP32's time over its own."""

    scheme: str
    milliseconds: float
    ratio: float
    min_token_cosine: float


@dataclass(frozen=True)
class CpuChoice:
    """The fastest scheme that is exact enough, and what stood beside it.

    `passed`: False when none is exact enough; `scheme` is then the most exact one. `weight_bits`: 7 where the
    processor has no VNNI. `version`: of `engine`.
    """

    scheme: str
    passed: bool
    candidates: tuple[CpuCandidate, ...]
    fp32_milliseconds: float
    weight_bits: int
    instruction_set: str
    processor: str
    engine: str
    version: str

    @property
    def chosen(self) -> CpuCandidate:
        """The candidate of `scheme`."""
        return next(one for one in self.candidates if one.scheme == self.scheme)

    def hint(self) -> SpeedHint:
        """What a load checks."""
        times = {FLOAT32: self.fp32_milliseconds, **{one.scheme: one.milliseconds for one in self.candidates}}
        return SpeedHint(
            instruction_set=self.instruction_set,
            processor=self.processor,
            scheme=self.scheme,
            engine=self.engine,
            version=self.version,
            ratio=self.chosen.ratio,
            milliseconds={name: round(value, 3) for name, value in times.items()},
        )


def choose_scheme(
    reference: Path,
    inputs: Sequence[Feed],
    ranges: Mapping[str, TensorRange] | None,
    work: Path,
    *,
    graph: Path | None = None,
    keep: frozenset[str] = frozenset(),
    schemes: Sequence[str] | None = None,
    engine: str = "onnxruntime",
    min_cosine: float = 0.98,
    rounds: int = ROUNDS,
    threads: int | None = None,
    say: Callable[[str], None] | None = None,
) -> CpuChoice:
    """Build every scheme of the FP32 graph below `work`, time them side by side, and choose.

    ``reference``: the FP32 graph that outputs and times are held against; ``graph``: what is quantised, None for
    ``reference`` (else the same function, smoothed). ``inputs``: some of the stage's real inputs, of which the first
    is timed. ``ranges``: those of `watch_cpu`; None leaves out the schemes that need them. ``schemes``: names in
    `CPU_SCHEMES`, None for all that ``engine`` runs in INT8.

    Raises InputError without inputs, for a scheme that is not known, or when none is left to try.
    """
    if not inputs:
        raise InputError("no inputs to choose an INT8 scheme with; give some of the stage's own")
    tell = say or (lambda _: None)
    instruction_set = best_instruction_set()
    bits = 7 if instruction_set in SATURATING else 8
    names = _applicable(schemes, engine, has_ranges=ranges is not None)
    open_graph, version = open_engine(engine, threads)
    runs: dict[str, Run] = {FLOAT32: open_graph(reference)}
    for name in names:
        tell(f"building {name}")
        file = work / f"{name}.onnx"
        placement = quantize_cpu(graph or reference, file, ranges, keep, name, weight_bits=bits)
        # Without an attention to fuse it is the same graph as the plain scheme.
        if CPU_SCHEMES[name].attention == "float" or placement.fused or len(names) == 1:
            runs[name] = open_graph(file)
    cosines = _cosines(runs, inputs)
    tell(f"timing {', '.join(runs)}")
    times = race(runs, inputs[0], rounds)
    candidates = _measured(times, cosines)
    scheme, passed = _best(candidates, min_cosine)
    float_ms = median(times[FLOAT32])
    return CpuChoice(scheme, passed, candidates, float_ms, bits, instruction_set, processor(), engine, version)


def _measured(times: Mapping[str, Sequence[float]], cosines: Mapping[str, float]) -> tuple[CpuCandidate, ...]:
    return tuple(
        CpuCandidate(
            name,
            median(times[name]),
            median(before / after for before, after in zip(times[FLOAT32], times[name], strict=True)),
            cosines[name],
        )
        for name in times
        if name != FLOAT32
    )


def _best(candidates: Sequence[CpuCandidate], min_cosine: float) -> tuple[str, bool]:
    """The fastest scheme that is exact enough, and whether there is one; else the most exact."""
    exact = [one for one in candidates if one.min_token_cosine >= min_cosine]
    fastest = max((one.ratio for one in exact), default=0.0)
    tied = [one for one in exact if one.ratio >= _TIE * fastest] or candidates
    return max(tied, key=lambda one: one.min_token_cosine).scheme, bool(exact)


def _applicable(schemes: Sequence[str] | None, engine: str, *, has_ranges: bool) -> list[str]:
    wanted = list(CPU_SCHEMES) if schemes is None else list(schemes)
    known = {name: known_scheme(name) for name in wanted}
    names = [
        name for name, scheme in known.items() if engine in scheme.engines and (has_ranges or not scheme.needs_ranges)
    ]
    if not names:
        raise InputError(
            f"no INT8 scheme for engine {engine!r} among {', '.join(wanted)}"
            f"{'' if has_ranges else ' without observed ranges'}; known are {', '.join(CPU_SCHEMES)}"
        )
    return names


def open_engine(name: str, threads: int | None) -> tuple[Callable[[Path], Run], str]:
    """What opens a graph, and its version."""
    if name == "openvino":
        from ..runtime.openvino.loader import compile_graph, import_openvino

        version = str(import_openvino().__version__).split("-", 1)[0]
        return (lambda file: _openvino_run(compile_graph(file, threads=threads))), version
    if name == "onnxruntime":
        version = str(import_onnxruntime().__version__)
        return (lambda file: _onnxruntime_run(load_session(file, Device(), threads=threads))), version
    raise InputError(f"engine {name!r} runs no INT8 on a CPU; accepted are onnxruntime and openvino")


def _onnxruntime_run(session: Any) -> Run:
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, dict(feed)), strict=True))


def _openvino_run(compiled: Any) -> Run:
    request = compiled.create_infer_request()
    names = [port.get_any_name() for port in compiled.outputs]

    def run(feed: Feed) -> Mapping[str, NDArray[Any]]:
        request.infer(dict(feed))
        return {name: request.get_output_tensor(index).data for index, name in enumerate(names)}

    return run


def _cosines(runs: Mapping[str, Run], inputs: Sequence[Feed]) -> dict[str, float]:
    """Scheme -> cosine of the worst token of any output of any sample; -1 for NaN."""
    worst = dict.fromkeys(runs, 1.0)
    for feed in inputs:
        expected = {name: value.copy() for name, value in runs[FLOAT32](feed).items()}
        for scheme, run in runs.items():
            actual = run(feed)
            for name, value in expected.items():
                cosine = compare(value, actual[name]).min_token_cosine
                worst[scheme] = min(worst[scheme], -1.0 if math.isnan(cosine) else cosine)
    return worst


def race(runs: Mapping[str, Run], feed: Feed, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every graph in every round; the graphs take turns, each round from another one on."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(rounds):
        start = number % len(order)
        for name in (*order[start:], *order[:start]):
            time.sleep(_SETTLE_SECONDS)
            once = _call(runs[name], feed)  # its weights and threads are awake then
            calls = min(max(1, int(_CALL_MILLISECONDS / once)), _MOST_CALLS)
            times[name].append(min(_call(runs[name], feed) for _ in range(calls)))
    return times


def _call(run: Run, feed: Feed) -> float:
    begin = time.perf_counter()
    run(feed)
    return 1000.0 * (time.perf_counter() - begin)
