"""`make bench-connectors`: connector against connector at real sizes, on one machine, in one run.

The job: one picture's tokens, as ViT-g/14 at 224 pixels (257 x 1408) and ViT-L/14 at 336 (577 x 1024) give them, to a
language model's width of 4096. The connectors: one linear layer, a 2-layer MLP, a Q-Former of one layer and BLIP-2's of
twelve, all with random weights: speed does not depend on their values. The metric: median wall time of one call, batch
1, FP32, in PyTorch and as exported graph in ONNX Runtime, with as many threads each; the fastest call is kept beside
it. Every graph's output is held against PyTorch's before it is timed.

Ends in one line of JSON, which is also kept in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bridgeport.export.tokens.connectors import ConnectorReport, compare_connectors
from bridgeport.export.tokens.table import connector_table
from bridgeport.runtime.cli.doctor import examine

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Measure, print, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        reports = list(
            compare_connectors(
                rounds=options.rounds,
                graphs=Path(folder),
                progress=lambda message: console.print(f"[dim]{message}[/]"),
            )
        )
    Console(width=140).print(connector_table(reports))
    document = _document(reports)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"connectors-{document['date']}.json"
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))
    return 0


def _document(reports: list[ConnectorReport]) -> dict[str, Any]:
    environment = examine()
    return {
        "benchmark": "connectors",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": environment["machine"],
        "libraries": {name: version for name, version in environment["libraries"].items() if version},
        "threads": torch.get_num_threads(),
        "precision": "fp32",
        "connectors": [{**asdict(report), "compression": report.compression} for report in reports],
    }


if __name__ == "__main__":
    sys.exit(main())
