"""A benchmark's child process: one peer, measured when the parent says so.

One process for each peer keeps their thread pools and allocators apart and makes the peak memory each one's own. It
reads one JSON object a line on stdin ({"job": FILE} first, then {"measure": true}) and answers one a line on stdout.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import numpy as np

from .peers import Job, peer_record


def main(peer: str, source: str, threads: str, job_file: str) -> None:
    """Load the peer, say so, then answer each line on stdin with one measured pass."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not stand between the answers
    job = Job.load(job_file)
    runner = peer_record(peer).make(Path(source), int(threads))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "device_rounds" in request:
            print(json.dumps(runner.device_latency(job, request["device_rounds"])), file=answers, flush=True)
            continue
        outputs = runner.run(job)
        if features_file := request.get("features_file"):
            np.save(features_file, outputs.image_features)
        answer = {"seconds": outputs.seconds, "token_ids": outputs.token_ids, "peak_bytes": peak_bytes()}
        print(json.dumps(answer), file=answers, flush=True)


def peak_bytes() -> int:
    """Peak resident memory of this process.

    Linux' `ru_maxrss` is no help: it starts at what the parent had when it forked. `VmHWM` starts with the program.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
