"""Latency and peak memory of a bundle, stage by stage, with its peers measured in the same run.

Every peer lives in a process of its own. A round asks each of them for one pass, in turn, so that a slow minute of a
noisy machine falls on all of them; ratios are taken within a round and their median is what is reported.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ...manifest import CONFIG_FILE
from .child import Child
from .peers import Job, peer_record, require_compiler
from .report import BenchReport, PeerResult, Round

__all__ = ["BenchReport", "Contestant", "bench", "measure"]

# Between two peers' passes: a thread pool that still spins would be timed as part of the next one.
_SETTLE_SECONDS = 0.3


@dataclass(frozen=True)
class Contestant:
    """One row of the table: a peer of `PEERS` and the bundle or checkpoint that it reads."""

    label: str
    peer: str
    source: Path
    # False for random weights of the same sizes: as fast, but its outputs say nothing.
    comparable: bool = True
    # A bundle of TensorRT engines, whose times on the GPU are told too.
    engines: bool = False


def bench(
    bundle: str | Path,
    *,
    against: Sequence[str] = (),
    checkpoint: str | Path | None = None,
    new_tokens: int = 32,
    rounds: int = 5,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure a bundle, and the peers in `against` beside it, on one picture and `new_tokens` greedy tokens.

    `against` holds names of `PEERS` or paths of further bundles. The peers of PyTorch run `checkpoint`; without one,
    random weights of the sizes that the bundle records, whose outputs are not compared.
    Raises InputError for an unknown peer.
    """
    contestants = [_bundle_contestant(Path(bundle))]
    for name in against:
        if (Path(name) / "manifest.json").is_file():
            contestants.append(_bundle_contestant(Path(name)))
            continue
        contestants.append(_peer_contestant(name, Path(bundle), checkpoint))
    return measure(
        contestants,
        _job(Path(bundle), new_tokens),
        rounds=rounds,
        threads=threads or core_count(),
        progress=progress,
    )


def _peer_contestant(name: str, bundle: Path, checkpoint: str | Path | None) -> Contestant:
    record = peer_record(name)
    if record.reads == "bundle":
        return Contestant(record.title, name, bundle)
    if checkpoint is not None:
        return Contestant(record.title, name, Path(checkpoint))
    return Contestant(f"{record.title}, random weights", name, (bundle / CONFIG_FILE).parent, comparable=False)


def core_count() -> int:
    """Cores that this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bundle_contestant(path: Path) -> Contestant:
    from ...bundle import read_manifest

    manifest = read_manifest(path)
    if manifest.score is not None:
        raise InputError(
            f"{path} scores pictures against texts ({manifest.model_kind}), and bench times generating; "
            "`bridgeport score --json` has the time of each stage"
        )
    vision, llm = (manifest.stage(stage).precision.upper() for stage in ("encoder", "llm"))
    label = llm if vision in ("FP32", llm) else f"{vision}, {llm} LLM"
    engines = all(stage.format == "tensorrt" for stage in manifest.stages)
    return Contestant(f"Bridgeport {label}{', TensorRT' if engines else ''}", "bridgeport", path, engines=engines)


def _job(bundle: Path, new_tokens: int) -> Job:
    """One test picture (a gradient with a disc) and a short prompt, prepared as the bundle says."""
    from PIL import Image, ImageDraw

    from ..pipeline import Pipeline
    from .bundle_chain import prepare_job

    gradient = np.linspace(0, 255, 480, dtype=np.uint8)
    picture = Image.fromarray(
        np.stack(np.broadcast_arrays(gradient[:, None], gradient[None, :], np.uint8(96)), axis=-1)
    )
    ImageDraw.Draw(picture).ellipse((120, 90, 330, 300), fill=(200, 40, 60))

    with Pipeline.load(bundle, threads=1) as pipeline:
        return prepare_job(pipeline, picture, "question: what is on the picture? answer:", new_tokens)


def measure(
    contestants: Sequence[Contestant],
    job: Job,
    *,
    rounds: int,
    threads: int,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Run `rounds` rounds over all contestants, after one that warms up and is thrown away."""
    tell = progress or (lambda message: None)
    with tempfile.TemporaryDirectory() as folder:
        job_file = Path(folder) / "job.npz"
        job.save(job_file)
        children: list[_Child] = []
        try:
            for contestant in contestants:
                tell(f"loading {contestant.label}")
                children.append(_Child(contestant, threads, job_file))
            features = [_warm_up(child, Path(folder), tell) for child in children]
            samples: list[list[Round]] = [[] for _ in children]
            for number in range(rounds):
                tell(f"round {number + 1} of {rounds}")
                for child, mine in zip(children, samples, strict=True):
                    time.sleep(_SETTLE_SECONDS)
                    mine.append(child.measure())
            device = [child.device_latency(rounds) if child.contestant.engines else {} for child in children]
        finally:
            for child in children:
                child.close()
    results = [
        PeerResult(
            child.contestant.label, child.contestant.peer, tuple(mine), feature, child.contestant.comparable, gpu
        )
        for child, mine, feature, gpu in zip(children, samples, features, device, strict=True)
    ]
    return BenchReport(tuple(results), threads=threads, new_tokens=job.new_tokens, prompt_tokens=job.input_ids.shape[1])


def _warm_up(child: _Child, folder: Path, tell: Callable[[str], None]) -> NDArray[np.float32]:
    tell(f"warming up {child.contestant.label}")
    file = folder / "features.npy"
    child.measure(file)
    features: NDArray[np.float32] = np.load(file)
    return features


class _Child(Child):
    """The process of one peer."""

    def __init__(self, contestant: Contestant, threads: int, job_file: Path) -> None:
        if contestant.peer == "torch-compile":
            require_compiler()
        self.contestant = contestant
        worker = [sys.executable, "-m", "bridgeport.runtime.bench.worker"]
        super().__init__(
            contestant.label, [*worker, contestant.peer, str(contestant.source), str(threads), str(job_file)]
        )

    def measure(self, features_file: Path | None = None) -> Round:
        """One pass; `features_file` receives the image features as `.npy`."""
        answer = self.ask({"features_file": None if features_file is None else str(features_file)})
        return Round(answer["seconds"], tuple(answer["token_ids"]), answer["peak_bytes"])

    def device_latency(self, rounds: int) -> dict[str, Any]:
        """Milliseconds on the GPU of `rounds` more passes, which are slower than the measured ones."""
        return self.ask({"device_rounds": rounds})
