"""Peak memory of an export, against the checkpoint's size in FP32.

The model: BLIP-2's own vision encoder ViT-g/14 (hidden 1408, 39 layers, 1.0 B parameters), a 12-layer Q-Former with 32
queries and a small Llama, with random weights: memory does not depend on their values. The export runs in a process
of its own. The metric: the peak of the resident set (RSS) of that process, from the kernel (`ru_maxrss`), and of it
and its children together, sampled. RSS counts file-backed pages too: weights mapped from the checkpoint and from the
exported files, which the kernel can drop; the anonymous part, which it cannot, is given beside it.

    python -m benchmarks.export_memory [--precision fp32|int4] [--work DIR] [--tiny]

Needs about 14 GB of disk under `--work`. Ends in one line of JSON, which is also kept in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
LIMIT = 2.5
_SAMPLE_SECONDS = 0.05

REAL_SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_heads": 8,
    "num_layers": 6,
    "max_position_embeddings": 2048,
    "extra_vocab": 7680,
    "vision_hidden_size": 1408,
    "vision_intermediate_size": 6144,
    "vision_heads": 16,
    "vision_layers": 39,
    "image_size": 224,
    "patch_size": 14,
    "qformer_hidden_size": 768,
    "qformer_intermediate_size": 3072,
    "qformer_heads": 12,
    "qformer_layers": 12,
    "num_query_tokens": 32,
}
TINY_SIZES: dict[str, Any] = {"vision_layers": 2, "qformer_layers": 2}


def main() -> int:
    """Make the checkpoint, export it while watching, print, keep the figures; exit status 1 above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "int4"), default="fp32")
    parser.add_argument("--work", type=Path, default=None, help="where checkpoint and bundle are written for a while")
    parser.add_argument("--tiny", action="store_true", help="a small model: tries the benchmark, keeps nothing")
    parser.add_argument("--step", choices=("write", "export"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "write":
        return _write(options.work, TINY_SIZES if options.tiny else REAL_SIZES)
    if options.step == "export":
        return _export(options.work, options.precision)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        document = _measure(Path(folder), options.precision, tiny=options.tiny)
    if not options.tiny:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"export-memory-{options.precision}-{document['date']}.json"
        file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))
    return 0 if document["reached"] else 1


def _write(work: Path, sizes: dict[str, Any]) -> int:
    from tests.checkpoints import write_blip2_checkpoint

    write_blip2_checkpoint(work / "checkpoint", text="llama", max_shard_size="2GB", **sizes)
    return 0


def _export(work: Path, precision: str) -> int:
    """The measured process: export, with a line on stdout for each step and one for the peak."""
    from bridgeport.export import export_checkpoint

    started = time.time()

    def show(step: str) -> None:
        print(json.dumps({"step": step, "at": time.time()}), flush=True)

    bundle = export_checkpoint(work / "checkpoint", work / "bundle", precision=precision, progress=show)
    checks = bundle.manifest.checks["export"]["stages"]
    result = {
        "seconds": round(time.time() - started, 1),
        "max_abs": {name: checks[name]["onnxruntime"]["max_abs"] for name in checks},
        "bundle_bytes": sum(record.size for record in bundle.manifest.files),
        # Linux gives kibibytes.
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(result), flush=True)
    return 0


def _measure(work: Path, precision: str, *, tiny: bool) -> dict[str, Any]:
    flags = ["--work", str(work), "--precision", precision, *(["--tiny"] if tiny else [])]
    command = [sys.executable, "-m", "benchmarks.export_memory", *flags, "--step"]
    subprocess.run([*command, "write"], check=True)
    size, parameters = _checkpoint_size(work / "checkpoint")
    with (work / "steps.jsonl").open("w+") as steps:
        child = subprocess.Popen([*command, "export"], stdout=steps)
        samples = _sample(child)
        if child.returncode:
            raise SystemExit(child.returncode)
        steps.seek(0)
        lines = [json.loads(line) for line in steps if line.startswith("{")]
    result, peak = lines[-1], max(samples, key=lambda sample: sample["total"])
    return {
        "benchmark": "export_memory",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": _machine(),
        "precision": precision,
        "parameters": parameters,
        "checkpoint_fp32_bytes": size,
        **result,
        "peak_rss_of_checkpoint": round(result["peak_rss_bytes"] / size, 2),
        "peak_rss_with_children_of_checkpoint": round(peak["total"] / size, 2),
        "peak_anonymous_of_checkpoint": round(max(sample["anonymous"] for sample in samples) / size, 2),
        "at_the_peak": peak | {"step": _step_at(lines[:-1], peak["at"])},
        "limit": LIMIT,
        "reached": max(result["peak_rss_bytes"], peak["total"]) <= LIMIT * size,
        "peak_rss_by_step": _peaks_by_step(lines[:-1], samples),
    }


def _sample(child: subprocess.Popen[bytes]) -> list[dict[str, float]]:
    """RSS of the child and its children until it ends: all, anonymous and file-backed bytes."""
    process = psutil.Process(child.pid)
    samples = []
    while child.poll() is None:
        sample = {"at": time.time(), "total": 0, "anonymous": 0, "file": 0}
        try:
            for one in (process, *process.children(recursive=True)):
                anonymous, file = _resident(one.pid)
                sample["anonymous"] += anonymous
                sample["file"] += file
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue
        sample["total"] = sample["anonymous"] + sample["file"]
        samples.append(sample)
        time.sleep(_SAMPLE_SECONDS)
    return samples


def _resident(pid: int) -> tuple[int, int]:
    """Anonymous and file-backed resident bytes of a process, as Linux tells them."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    kib = {name: int(fields.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssFile", "RssShmem")}
    return kib["RssAnon"] * 1024, (kib["RssFile"] + kib["RssShmem"]) * 1024


def _step_at(steps: list[dict[str, Any]], at: float) -> str:
    """The last step that had begun at that time."""
    begun = [step["step"] for step in steps if step["at"] <= at]
    return begun[-1] if begun else "starting"


def _peaks_by_step(steps: list[dict[str, Any]], samples: list[dict[str, float]]) -> dict[str, float]:
    """The largest sampled RSS within each step, in bytes."""
    peaks: dict[str, float] = {}
    for sample in samples:
        step = _step_at(steps, sample["at"])
        peaks[step] = max(peaks.get(step, 0), sample["total"])
    return peaks


def _checkpoint_size(checkpoint: Path) -> tuple[int, int]:
    """Bytes in FP32 and number of parameters, from the headers."""
    from bridgeport.models import load_checkpoint

    parameters = sum(math.prod(entry.shape) for entry in load_checkpoint(checkpoint).weights.entries.values())
    return 4 * parameters, parameters


def _machine() -> dict[str, Any]:
    from bridgeport.runtime.cli.doctor import machine

    return machine()


if __name__ == "__main__":
    sys.exit(main())
