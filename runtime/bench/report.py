"""What a benchmark found: medians, ratios within rounds, agreement of the outputs; as JSON and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .peers import STAGES

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Round:
    """One pass of one peer: seconds per stage, the tokens it chose, and its process's peak memory so far."""

    seconds: dict[str, float]
    token_ids: tuple[int, ...]
    peak_bytes: int

    def ms(self, stage: str) -> float:
        """Milliseconds of a stage, or of all of them for "total"."""
        seconds = sum(self.seconds.values()) if stage == "total" else self.seconds[stage]
        return 1000.0 * seconds


@dataclass(frozen=True)
class PeerResult:
    """All rounds of one peer; `image_features` `[1, Q, D]` is what its connector gave."""

    label: str
    peer: str
    rounds: tuple[Round, ...]
    image_features: NDArray[np.float32]
    comparable: bool = True
    # Of TensorRT engines: stage -> h2d, compute, d2h, latency, enqueue -> min, mean, p50, p90, p99, max in ms.
    device_ms: dict[str, Any] = field(default_factory=dict)

    def median_ms(self, stage: str) -> float:
        """Median over the rounds."""
        return median(one.ms(stage) for one in self.rounds)

    @property
    def peak_bytes(self) -> int:
        """Peak resident memory of the peer's process, weights and libraries included."""
        return max(one.peak_bytes for one in self.rounds)


@dataclass(frozen=True)
class BenchReport:
    """The results of one run, all peers measured in turn on one machine."""

    results: tuple[PeerResult, ...]
    threads: int
    new_tokens: int
    prompt_tokens: int

    def baseline(self) -> PeerResult:
        """What ratios are taken against: PyTorch FP32 where it ran, else the first peer."""
        return next((result for result in self.results if result.peer == "torch"), self.results[0])

    def speed_up(self, result: PeerResult, stage: str) -> float:
        """Median over the rounds of (baseline's time / this peer's time) for a stage."""
        pairs = zip(self.baseline().rounds, result.rounds, strict=True)
        return median(theirs.ms(stage) / mine.ms(stage) for theirs, mine in pairs)

    def agreement(self, result: PeerResult) -> dict[str, Any] | None:
        """How the outputs compare with the baseline's: the worst token's cosine, and equal leading tokens.

        None where one of the two has random weights.
        """
        if not (result.comparable and self.baseline().comparable):
            return None
        ours, theirs = (
            result.image_features[0].astype(np.float64),
            self.baseline().image_features[0].astype(np.float64),
        )
        norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
        mine, reference = result.rounds[0].token_ids, self.baseline().rounds[0].token_ids
        equal = next((i for i, (a, b) in enumerate(zip(mine, reference, strict=True)) if a != b), len(reference))
        return {
            "min_token_cosine": float(((ours * theirs).sum(-1) / norms).min()),
            "max_abs": float(np.abs(ours - theirs).max()),
            "equal_leading_tokens": equal,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data: per peer medians in ms, ratios to the baseline, peak memory, agreement of the outputs."""
        return {
            "threads": self.threads,
            "new_tokens": self.new_tokens,
            "prompt_tokens": self.prompt_tokens,
            "rounds": len(self.results[0].rounds),
            "baseline": self.baseline().label,
            "peers": [self._peer_json(result) for result in self.results],
        }

    def _peer_json(self, result: PeerResult) -> dict[str, Any]:
        columns = (*STAGES, "total")
        return {
            "label": result.label,
            "peer": result.peer,
            "median_ms": {stage: round(result.median_ms(stage), 3) for stage in columns},
            "min_ms": {stage: round(min(one.ms(stage) for one in result.rounds), 3) for stage in columns},
            "decode_ms_per_token": round(result.median_ms("decode") / max(self.new_tokens - 1, 1), 3),
            "speed_up": {stage: round(self.speed_up(result, stage), 3) for stage in columns},
            "peak_mib": round(result.peak_bytes / 2**20, 1),
            "agreement": self.agreement(result),
            **({"device_ms": result.device_ms} if result.device_ms else {}),
        }

    def device_text(self) -> str:
        """Times on the GPU as `trtexec` words them, for each stage; empty without TensorRT engines."""
        from ..tensorrt.latency import as_text

        stages = [(result.label, *one) for result in self.results for one in result.device_ms.items()]
        return "\n".join(f"{label}, {stage}\n{as_text(summary)}" for label, stage, summary in stages)

    def table(self) -> Table:
        """The same as a rich table: milliseconds, with the ratio to the baseline in brackets."""
        from rich.table import Table

        table = Table(
            title=f"1 picture, {self.prompt_tokens} prompt tokens, {self.new_tokens} new tokens, "
            f"{self.threads} threads; median ms (x faster than {self.baseline().label})",
            title_justify="left",
        )
        table.add_column("peer")
        for column in ("encoder", "connector", "prefill", "decode / token", "chain", "peak MiB"):
            table.add_column(column, justify="right")
        table.add_column("outputs against the baseline")
        for result in self.results:
            agreement = self.agreement(result)
            per_token = result.median_ms("decode") / max(self.new_tokens - 1, 1)
            table.add_row(
                result.label,
                *(self._cell(result, stage, result.median_ms(stage)) for stage in ("encoder", "connector", "prefill")),
                self._cell(result, "decode", per_token),
                self._cell(result, "total", result.median_ms("total")),
                f"{result.peak_bytes / 2**20:,.0f}",
                "not compared"
                if agreement is None
                else f"cosine {agreement['min_token_cosine']:.6f}, "
                f"first {agreement['equal_leading_tokens']} of {self.new_tokens} tokens equal",
            )
        return table

    def _cell(self, result: PeerResult, stage: str, milliseconds: float) -> str:
        return f"{milliseconds:,.1f} ({self.speed_up(result, stage):.2f}x)"
