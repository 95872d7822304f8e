"""Running a bundle with nothing but the run-time dependencies: torch and its company cannot even be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.runtime.generation import pictures

from bridgeport.runtime import Pipeline

SCRIPT = """
import json, sys

class Blocker:
    names = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime_genai", "polygraphy", "safetensors",
             "huggingface_hub", "scipy", "matplotlib", "psutil", "sympy"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
from bridgeport.cli import main
status = main(["run", *sys.argv[1:]])
from bridgeport.runtime import Pipeline
with Pipeline.load(sys.argv[1], threads=1) as pipeline:
    pieces = list(pipeline.stream(sys.argv[3], "a photo of", max_new_tokens=6))
loaded = sorted(Blocker.names & {name.partition(".")[0] for name in sys.modules})
print(json.dumps({"status": status, "loaded": loaded, "streamed": "".join(pieces)}), file=sys.stderr)
"""


@pytest.mark.slow
def test_a_bundle_runs(blip2_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    bundle, picture, sheet = blip2_bundle("llama-gqa-tied"), tmp_path / "picture.png", tmp_path / "map.png"
    pictures(1)[0].save(picture)
    options = ["--prompt", "a photo of", "--max-new-tokens", "6", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, bundle, "--image", picture, *options, "--json",
         "--attention-map", sheet],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stderr.strip().splitlines()[-1])
    answer = json.loads(done.stdout)
    assert report == {"status": 0, "loaded": [], "streamed": answer["text"]}
    assert sheet.is_file()
    with Pipeline.load(bundle, threads=1) as pipeline:
        expected = pipeline.generate(picture, "a photo of", max_new_tokens=6)
    assert (answer["text"], answer["token_ids"]) == (expected.text, list(expected.token_ids))
