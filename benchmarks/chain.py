"""`make bench`: the whole chain at a real size, Bridgeport beside PyTorch, in one run.

The model: ViT-L/14 at 224 pixels (304 M parameters), a 12-layer Q-Former with 32 queries (105 M) and a Llama-shaped
language model of 246 M, all with random weights: speed does not depend on their values, and nothing has to be
downloaded. The job: one picture, a short question, 32 greedy tokens. The metric: median wall time per stage over the
rounds; ratios are medians of the ratios within each round. The outputs of every peer are compared with PyTorch FP32's.

Then INT8: encoder and connector beside OpenVINO and NNCF (`benchmarks.int8`), and the chain with INT8 vision and an
INT4 language model beside PyTorch.

Ends in one line of JSON, which is also kept in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from tests.checkpoints import write_blip2_checkpoint

from benchmarks import int8
from bridgeport.calibration import GateLimits, QuantizeOptions, quantize_bundle
from bridgeport.export import export_checkpoint
from bridgeport.models.small.pictures import stream
from bridgeport.runtime.bench import BenchReport, bench, core_count
from bridgeport.runtime.cli.doctor import examine

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 32_000
CALIBRATION_PICTURES = 12
PEERS = ("torch", "torch-bf16", "torch-compile")

# What two cores are to reach against PyTorch FP32: (peer's label, stage) -> ratio.
GOALS = {
    ("Bridgeport FP32", "encoder"): 1.3,
    ("Bridgeport FP32", "connector"): 1.3,
    ("Bridgeport FP32", "decode"): 2.5,
    ("Bridgeport INT4", "decode"): 7.0,
}


def write_checkpoint(directory: Path) -> Path:
    """A random checkpoint of the sizes named above."""
    return write_blip2_checkpoint(
        directory,
        text="llama",
        hidden_size=1024,
        intermediate_size=2816,
        num_heads=16,
        num_layers=14,
        max_position_embeddings=2048,
        extra_vocab=VOCABULARY - 321,
        vision_hidden_size=1024,
        vision_intermediate_size=4096,
        vision_heads=16,
        vision_layers=24,
        image_size=224,
        patch_size=14,
        qformer_hidden_size=768,
        qformer_intermediate_size=3072,
        qformer_heads=12,
        qformer_layers=12,
        num_query_tokens=32,
    )


def main() -> int:
    """Build the checkpoint and both bundles, measure, print, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--against", default=",".join(PEERS), help="peers of PyTorch, comma-separated")
    parser.add_argument("--work", type=Path, default=None, help="keep checkpoint and bundles here, and reuse them")
    options = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        checkpoint, bundles = _artefacts(work, console)
        report = bench(
            bundles["fp32"],
            against=[str(bundles["int4"]), *filter(None, options.against.split(","))],
            checkpoint=checkpoint,
            rounds=options.rounds,
            threads=options.threads,
            progress=lambda message: console.print(f"[dim]{message}[/]"),
        )
        Console(width=160).print(report.table())
        threads = options.threads or core_count()
        vision = int8.run(
            bundles["fp32"], work / "int8-stages", rounds=options.rounds, threads=threads, console=console
        )
        chain = int8.measure_chain(bundles["int8"], checkpoint, rounds=options.rounds, threads=threads)
    document = _document(report)
    for goal in document["goals"]:
        print(f"{goal['peer']} {goal['stage']}: {goal['measured']}x, to reach {goal['goal']}x", file=sys.stderr)
    goals = vision["goals"] + chain["goals"]
    int8.print_goals(goals)
    document["int8"] = {"stages": vision["stages"], "peers": vision["peers"], "chain": chain, "goals": goals}
    _keep(document)
    print(json.dumps(document))
    return 0


def _artefacts(work: Path, console: Console) -> tuple[Path, dict[str, Path]]:
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        console.print("[dim]writing a random checkpoint of 655 M parameters[/]")
        write_checkpoint(checkpoint)
    bundles = {precision: work / precision for precision in ("fp32", "int4")}
    for precision, bundle in bundles.items():
        if not bundle.exists():
            console.print(f"[dim]exporting {precision}[/]")
            export_checkpoint(checkpoint, bundle, precision=precision)
    bundles["int8"] = work / "int8"
    if not bundles["int8"].exists():
        console.print("[dim]quantising: INT8 vision, INT4 language model[/]")
        _quantize(bundles["fp32"], bundles["int8"])
    return checkpoint, bundles


def _quantize(source: Path, out: Path) -> None:
    """INT8 as `bridgeport quantize` makes it, for OpenVINO where that is installed.

    Random weights answer nothing and their logits have no direction to keep, so the gate's limits are open here.
    """
    engine = "openvino" if find_spec("openvino") is not None else "onnxruntime"
    options = QuantizeOptions(precision="int8", stages={"llm": "int4"}, engine=engine, samples=CALIBRATION_PICTURES)
    with tempfile.TemporaryDirectory() as folder:
        for number, example in enumerate(stream(0, CALIBRATION_PICTURES)):
            example.image.save(Path(folder) / f"{number}.png")
        quantize_bundle(source, out, folder, options, limits=GateLimits(min_cosine=-1.0, max_slowdown=100.0))


def _document(report: BenchReport) -> dict[str, Any]:
    environment = examine()
    rows = report.to_json()
    ratios = {(peer["label"], stage): ratio for peer in rows["peers"] for stage, ratio in peer["speed_up"].items()}
    return {
        "benchmark": "chain",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": environment["machine"],
        "libraries": {name: version for name, version in environment["libraries"].items() if version},
        **rows,
        "goals": [
            {"peer": peer, "stage": stage, "goal": goal, "measured": ratios[peer, stage],
             "reached": ratios[peer, stage] >= goal}
            for (peer, stage), goal in GOALS.items() if (peer, stage) in ratios
        ],
    }  # fmt: skip


def _keep(document: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"chain-{document['date']}.json"
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
