"""How long the parts of a run take on the GPU, as `trtexec` sums them up: copies in, compute, copies out, enqueue."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .device import Device

PARTS = ("h2d", "compute", "d2h", "latency", "enqueue")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run, by CUDA events: copies to the device, compute, copies back; `enqueue` on the host."""

    h2d: float
    compute: float
    d2h: float
    enqueue: float

    @property
    def latency(self) -> float:
        """The three on the device together."""
        return self.h2d + self.compute + self.d2h


class Stopwatch:
    """Four events that are recorded around the parts of every run, and what they told."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._events = [device.cuda.create_event() for _ in range(4)]
        self._enqueue = 0.0
        self._begun = 0.0
        self.runs: list[Latency] = []

    def mark(self, place: int) -> None:
        """0 before the copies in, 1 before and 2 after the compute, 3 after the copies out."""
        now = time.perf_counter()
        if place == 1:
            self._begun = now
        if place == 2:
            self._enqueue = 1000.0 * (now - self._begun)
        self._device.cuda.record_event(self._events[place], self._device.stream)

    def read(self) -> None:
        """Keep a run's times; the stream must have come to its end."""
        cuda, events = self._device.cuda, self._events
        h2d, compute, d2h = (cuda.elapsed(events[at], events[at + 1]) for at in range(3))
        self.runs.append(Latency(h2d, compute, d2h, self._enqueue))

    def close(self) -> None:
        """Free the events."""
        for event in self._events:
            self._device.cuda.destroy_event(event)
        self._events.clear()


def summarise(runs: Sequence[Latency]) -> dict[str, dict[str, float]]:
    """Part -> min, mean, p50, p90, p99, max in milliseconds; empty without runs."""
    return {part: _statistics([getattr(run, part) for run in runs]) for part in PARTS} if runs else {}


def as_text(summary: dict[str, dict[str, float]]) -> str:
    """One line for each part, as `trtexec` prints them."""
    names = {"h2d": "H2D Latency", "compute": "GPU Compute Time", "d2h": "D2H Latency"}
    names |= {"latency": "Latency", "enqueue": "Enqueue Time"}
    return "\n".join(
        f"{names[part]}: min = {one['min']:.4g} ms, max = {one['max']:.4g} ms, mean = {one['mean']:.4g} ms, "
        f"median = {one['p50']:.4g} ms, percentile(90%) = {one['p90']:.4g} ms, percentile(99%) = {one['p99']:.4g} ms"
        for part, one in summary.items()
    )


def _statistics(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    # The smallest value that so many percent do not exceed: one that was measured.
    found = {f"p{share}": ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)] for share in PERCENTILES}
    return {"min": ordered[0], "mean": sum(ordered) / len(ordered), **found, "max": ordered[-1]}
