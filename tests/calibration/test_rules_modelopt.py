"""The rules on what NVIDIA's modelopt.onnx writes, in an environment of its own.

modelopt pins older versions of onnx and onnxruntime, so it is never installed beside this package: the test makes a
virtual environment that sees this one's torch and onnxruntime and holds modelopt and what else it imports.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import onnx_ir as ir
import pytest
from tests.calibration.blocks import block_model

from bridgeport.calibration.rules import check_rules

pytestmark = pytest.mark.slow

_PACKAGES = (
    "nvidia-modelopt==0.47.0",
    "onnx==1.21.0",
    "onnxslim",
    "onnxconverter-common",
    "nvidia-ml-py",
    "omegaconf",
    "antlr4-python3-runtime==4.9.3",
    "pulp",
    "ninja",
    "lief",
    "cppimport",
    "mako",
    "pybind11",
)
_QUANTIZE = """
import sys
import numpy as np
import modelopt.onnx.quantization as moq
source, mode, tokens, width, high, out = sys.argv[1:]
data = {"x": np.random.default_rng(0).normal(size=(4, int(tokens), int(width))).astype(np.float32)}
shapes = f"x:4x{tokens}x{width}"
moq.quantize(source, quantize_mode=mode, calibration_data=data, calibration_eps=["cpu"], calibration_method="max",
             calibration_shapes=shapes, high_precision_dtype=high, output_path=out)
"""
_TIMEOUT_SECONDS = 600


@pytest.fixture(scope="module")
def modelopt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with modelopt; skips where the packages cannot be had."""
    home = tmp_path_factory.mktemp("modelopt")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    outer = home / "lib" / version / "site-packages" / "outer.pth"
    outer.write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "-q", "--no-deps", *_PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"modelopt cannot be installed ({last}); run with a package index at hand")
    return python


@pytest.mark.parametrize(
    ("mode", "head_size", "high", "expected"),
    [
        # Weights keep their float numbers, and the norm reads the skip connection's pair.
        ("int8", 16, "fp32", {"weight-stored-float", "quantized-norm"}),
        # Its FP8 attention leaves the scale on the scores.
        ("fp8", 16, "fp32", {"weight-stored-float", "quantized-norm", "attention-fp8-order"}),
        # INT8 attention without a look at the head size, as in a ViT-g.
        ("int8", 88, "fp32", {"weight-stored-float", "quantized-norm", "attention-size"}),
        # Its own default: norms and softmax in FP16 as well.
        ("int8", 16, "fp16", {"weight-stored-float", "quantized-norm", "float16-norm", "float16-softmax"}),
    ],
)
def test_modelopt(modelopt: Path, tmp_path: Path, mode: str, head_size: int, high: str, expected: set[str]) -> None:
    source, out = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    ir.save(block_model(tokens=24, head_size=head_size, mask=True), source)
    arguments = [str(source), mode, "24", str(2 * head_size), high, str(out)]
    command = [str(modelopt), "-c", _QUANTIZE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    found = check_rules(out, precision=mode)
    assert {one.rule for one in found} == expected, [one.as_text() for one in found]
