"""INT8 vision stages on a CPU: ViT-L/14-224 and a 12-layer Q-Former, ours beside OpenVINO and NNCF, in one run.

Random weights of the true sizes (speed does not depend on their values), calibrated and timed on the pictures of
`SEED`. Every contestant has a process of its own and they take turns; a ratio is the median of the ratios within each
round. Every output is held against ONNX Runtime's FP32 by its worst token's cosine. OpenVINO and NNCF come from an
environment of their own, made once; without it (no network, say) their rows are left out with a line that says so.

Ends in one line of JSON, which is also kept in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bridgeport.calibration.collect import collect
from bridgeport.calibration.placement.cpu import CPU_SCHEMES, quantize_cpu, watch_cpu
from bridgeport.calibration.placement.patterns import infer_types
from bridgeport.calibration.records import TensorRange
from bridgeport.runtime.bench import core_count
from bridgeport.runtime.bench.child import Child
from bridgeport.runtime.cli.doctor import examine
from bridgeport.runtime.parity.metrics import compare

RESULTS = Path(__file__).parent / "results"
WORKER = Path(__file__).parent / "int8_worker.py"
VENV = Path(__file__).parent.parent / "build" / "bench-venv"
PACKAGES = ("openvino==2026.4.1", "nncf==3.4.0")
BASELINE = "ONNX Runtime FP32"
NNCF, BF16 = "OpenVINO INT8, NNCF", "OpenVINO bf16"
SEED, SAMPLES = 0, 8
# Between two contestants' passes: a thread pool that still spins would be timed as part of the next one.
_SETTLE_SECONDS = 0.25

# Peer of PyTorch -> how many times as fast the chain with INT8 vision and an INT4 language model is to be.
CHAIN_PEERS = {"torch": 5.0, "torch-bf16": 2.5}

Feed = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Contestant:
    """One row. `scheme`: what its graph is made by: "" the FP32 graph, "nncf", or a name in `CPU_SCHEMES`."""

    label: str
    engine: str
    scheme: str = ""
    precision: str = "f32"


CONTESTANTS = (
    Contestant(BASELINE, "onnxruntime"),
    *(
        Contestant(f"Bridgeport {name}", "onnxruntime", name)
        for name, scheme in CPU_SCHEMES.items()
        if "onnxruntime" in scheme.engines
    ),
    *(
        Contestant(f"Bridgeport {name}, OpenVINO", "openvino", name)
        for name, scheme in CPU_SCHEMES.items()
        if "openvino" in scheme.engines
    ),
    Contestant("OpenVINO FP32", "openvino"),
    Contestant(BF16, "openvino", precision="bf16"),
    Contestant(NNCF, "openvino", "nncf"),
)

# Stage -> (what the fastest of ours is held against, ratio to reach).
GOALS: dict[str, tuple[tuple[str, float], ...]] = {
    "encoder": ((BASELINE, 3.0), (NNCF, 1.0), (BF16, 1.8)),
    "connector": ((BASELINE, 1.5),),
}


def measure_stage(
    stage: str, graph: Path, feeds: list[Feed], work: Path, *, rounds: int, threads: int, console: Console
) -> list[dict[str, Any]]:
    """A row for each contestant that can run: median milliseconds, ratios, worst token's cosine."""
    folder = work / stage
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "input.npz", **feeds[0])  # type: ignore[arg-type]
    peers = bench_python(console)
    files = build_graphs(graph, feeds, folder, peers, console)
    children: list[_Child] = []
    try:
        for contestant in CONTESTANTS:
            if contestant.scheme in files and (contestant.engine == "onnxruntime" or peers is not None):
                console.print(f"[dim]{stage}: loading {contestant.label}[/]")
                children.append(_Child(contestant, files[contestant.scheme], folder, threads, peers))
        outputs = [child.output(folder / "output.npy") for child in children]
        times: list[list[float]] = [[] for _ in children]
        for number in range(rounds):
            console.print(f"[dim]{stage}: round {number + 1} of {rounds}[/]")
            for child, mine in zip(children, times, strict=True):
                time.sleep(_SETTLE_SECONDS)
                mine.append(child.seconds())
    finally:
        for child in children:
            child.close()
    return [
        _row(child.contestant, mine, times[0], output, outputs[0])
        for child, mine, output in zip(children, times, outputs, strict=True)
    ]


def _row(
    contestant: Contestant, mine: list[float], baseline: list[float], output: NDArray[Any], expected: NDArray[Any]
) -> dict[str, Any]:
    return {
        "label": contestant.label,
        "engine": contestant.engine,
        "median_ms": round(1000 * median(mine), 2),
        "min_ms": round(1000 * min(mine), 2),
        "speed_up": round(median(before / after for before, after in zip(baseline, mine, strict=True)), 3),
        "min_token_cosine": round(compare(expected, output).min_token_cosine, 6),
        "rounds_ms": [round(1000 * one, 2) for one in mine],
    }


def build_graphs(graph: Path, feeds: list[Feed], folder: Path, peers: Path | None, console: Console) -> dict[str, Path]:
    """Scheme -> graph file."""
    files = {"": graph}
    ranges = observed_ranges(graph, feeds)
    for name in CPU_SCHEMES:
        console.print(f"[dim]quantising: {name}[/]")
        files[name] = folder / f"{name}.onnx"
        quantize_cpu(graph, files[name], ranges, frozenset(), name)
    if peers is not None:
        console.print("[dim]quantising: NNCF[/]")
        samples = folder / "samples.npz"
        np.savez(samples, **{f"{n}:{key}": array for n, feed in enumerate(feeds) for key, array in feed.items()})  # type: ignore[arg-type]
        out = folder / "nncf.xml"
        done = subprocess.run(
            [str(peers), str(WORKER), "nncf", str(graph), str(samples), str(out)], capture_output=True, text=True
        )
        if done.returncode == 0:
            files["nncf"] = out
        else:
            console.print(f"NNCF left out: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return files


def observed_ranges(graph: Path, feeds: list[Feed]) -> Mapping[str, TensorRange]:
    """Smallest and largest number of every value that a scheme asks for: what NNCF's default takes too."""
    model = ir.load(graph)
    infer_types(model)
    observations = collect(graph, feeds, watch_cpu(model), key="benchmark", samples=len(feeds))
    return observations.ranges("minmax")


def bench_python(console: Console) -> Path | None:
    """The Python of an environment with OpenVINO and NNCF, made at the first call; None where it cannot be made."""
    python = VENV / "bin" / "python"
    done = VENV / ".installed"
    wanted = "\n".join(PACKAGES)
    if done.is_file() and done.read_text() == wanted:
        return python
    console.print(f"[dim]making {VENV} with {', '.join(PACKAGES)}[/]")
    try:
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True, capture_output=True, text=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True, capture_output=True, text=True
        )
    except subprocess.CalledProcessError as error:
        console.print(f"OpenVINO and NNCF left out: {(error.stderr.strip().splitlines() or ['no message'])[-1]}")
        return None
    done.write_text(wanted)
    return python


class _Child(Child):
    """The process of one engine."""

    def __init__(self, contestant: Contestant, graph: Path, folder: Path, threads: int, peers: Path | None) -> None:
        self.contestant = contestant
        python = str(peers) if contestant.engine == "openvino" and peers is not None else sys.executable
        inputs = [str(graph), str(folder / "input.npz"), str(threads), contestant.precision]
        super().__init__(contestant.label, [python, str(WORKER), contestant.engine, *inputs])

    def seconds(self) -> float:
        """Of one pass."""
        return float(self.ask({})["seconds"])

    def output(self, file: Path) -> NDArray[Any]:
        """What one pass gives."""
        self.ask({"save": str(file)})
        found: NDArray[Any] = np.load(file)
        return found


def goals_of(stage: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, for the fastest of ours on each engine, from the rounds themselves."""
    found = []
    for engine in ("onnxruntime", "openvino"):
        ours = [row for row in rows if row["label"].startswith("Bridgeport") and row["engine"] == engine]
        if not ours:
            continue
        best = max(ours, key=lambda row: row["speed_up"])
        for peer, goal in GOALS[stage]:
            for against in (row for row in rows if row["label"] == peer):
                pairs = zip(against["rounds_ms"], best["rounds_ms"], strict=True)
                measured = round(median(theirs / mine for theirs, mine in pairs), 3)
                found.append(
                    {"stage": stage, "ours": best["label"], "against": peer, "goal": goal, "measured": measured,
                     "reached": measured >= goal}
                )  # fmt: skip
    return found


def table_of(stage: str, rows: list[dict[str, Any]], threads: int) -> Table:
    """The rows for people."""
    table = Table(title=f"{stage}, one picture, {threads} threads", title_justify="left")
    for column in ("", "median ms", f"x faster than {BASELINE}", "worst token's cosine"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(
            row["label"], f"{row['median_ms']:.1f}", f"{row['speed_up']:.2f}", f"{row['min_token_cosine']:.5f}"
        )
    return table


def run(bundle: Path, work: Path, *, rounds: int, threads: int, console: Console) -> dict[str, Any]:
    """Measure encoder and connector of an FP32 bundle; `work` takes the graphs. The document that is kept."""
    pixels = [
        {"pixel_values": np.random.default_rng(SEED + number).standard_normal((1, 3, 224, 224)).astype(np.float32)}
        for number in range(SAMPLES)
    ]
    feeds = {"encoder": pixels, "connector": image_embeds(bundle / "encoder" / "model.onnx", pixels, threads)}
    stages: dict[str, Any] = {}
    goals: list[dict[str, Any]] = []
    for stage, mine in feeds.items():
        graph = bundle / stage / "model.onnx"
        rows = measure_stage(stage, graph, mine, work, rounds=rounds, threads=threads, console=console)
        Console(width=140).print(table_of(stage, rows, threads))
        stages[stage] = rows
        goals += goals_of(stage, rows)
    environment = examine()
    return {
        "benchmark": "int8",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": environment["machine"],
        "libraries": {name: version for name, version in environment["libraries"].items() if version},
        "peers": PACKAGES,
        "threads": threads,
        "rounds": rounds,
        "stages": stages,
        "goals": goals,
    }


def measure_chain(bundle: Path, checkpoint: Path, *, rounds: int, threads: int) -> dict[str, Any]:
    """The whole chain of a bundle with INT8 vision and an INT4 language model, beside PyTorch's FP32 and bf16."""
    from bridgeport.runtime.bench import bench

    peers = (*(["openvino"] if find_spec("openvino") is not None else []), *CHAIN_PEERS)
    report = bench(bundle, against=peers, checkpoint=checkpoint, rounds=rounds, threads=threads)
    Console(width=160).print(report.table())
    results = {one.peer: one for one in report.results}
    goals = []
    for engine in (name for name in ("bridgeport", "openvino") if name in results):
        for peer, goal in CHAIN_PEERS.items():
            pairs = zip(results[peer].rounds, results[engine].rounds, strict=True)
            measured = round(median(theirs.ms("total") / mine.ms("total") for theirs, mine in pairs), 3)
            goals.append(
                {"stage": "chain", "ours": results[engine].label, "against": results[peer].label, "goal": goal,
                 "measured": measured, "reached": measured >= goal}
            )  # fmt: skip
    return {**report.to_json(), "goals": goals}


def image_embeds(graph: Path, pixels: list[Feed], threads: int) -> list[Feed]:
    """What the connector is given for these pictures."""
    from bridgeport.runtime.onnxruntime.loader import Device, load_session

    session = load_session(graph, Device(), threads=threads)
    return [{"image_embeds": session.run(["image_embeds"], one)[0]} for one in pixels]


def main() -> int:
    """Export where nothing is there yet, measure, print, keep the figures."""
    from benchmarks.chain import write_checkpoint
    from bridgeport.export import export_checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=core_count())
    parser.add_argument("--bundle", type=Path, default=None, help="an FP32 bundle of these sizes; None exports one")
    parser.add_argument("--chain", type=Path, default=None, help="a bundle with INT8 vision and an INT4 LLM")
    parser.add_argument("--checkpoint", type=Path, default=None, help="what it was made from, for PyTorch")
    options = parser.parse_args()
    if (options.chain is None) != (options.checkpoint is None):
        parser.error("--chain and --checkpoint belong together")
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        work, bundle = Path(folder), options.bundle
        if bundle is None:
            console.print("[dim]writing and exporting a random checkpoint[/]")
            bundle = export_checkpoint(write_checkpoint(work / "checkpoint"), work / "fp32").path
        document = run(bundle, work, rounds=options.rounds, threads=options.threads, console=console)
    if options.chain is not None:
        chain = measure_chain(options.chain, options.checkpoint, rounds=options.rounds, threads=options.threads)
        document["goals"] += chain.pop("goals")
        document["chain"] = chain
    finish(document)
    return 0


def finish(document: dict[str, Any]) -> None:
    """Print what was to be reached and the line of JSON; keep the document."""
    print_goals(document["goals"])
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"int8-{document['date']}.json"
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


def print_goals(goals: list[dict[str, Any]]) -> None:
    """A line each."""
    for goal in goals:
        figures = f"{goal['measured']}x, to reach {goal['goal']}x"
        print(f"{goal['stage']}: {goal['ours']} against {goal['against']}: {figures}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
