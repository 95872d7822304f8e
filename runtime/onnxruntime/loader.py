"""ONNX files to ONNX Runtime sessions, on a device that the caller names."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import DependencyError, EngineError, InputError

# Device name -> execution provider. The CPU stays behind every other one, for operators that it lacks.
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Fusions of ONNX Runtime whose operators take longer on the CPU than the nodes that they replace (1.31, two cores,
# ViT-L/14): 28.6 ms for BiasGelu against 14.0 for Add and Gelu, 2.6 ms for SkipLayerNormalization against 1.4.
SLOW_FUSIONS = ("BiasGeluFusion", "SkipLayerNormFusion")

_NOT_LOADED = "Failed to load "  # what `onnxruntime.preload_dlls` prints in front of a library


@dataclass(frozen=True)
class Device:
    """Where a session computes: `type` is a key of `PROVIDERS`, `index` counts from 0."""

    type: str = "cpu"
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Device:
        """ "cpu", "cuda" or "cuda:1"; InputError for anything else."""
        match = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", text)
        if match is None or (match[1] == "cpu" and match[2] not in (None, "0")):
            raise InputError(f"device {text!r} is unknown; accepted are cpu, cuda and cuda:N")
        return cls(match[1], int(match[2] or 0))

    @property
    def providers(self) -> list[Any]:
        """For `InferenceSession(providers=...)`."""
        if self.type == "cpu":
            return [PROVIDERS["cpu"]]
        return self.providers_with({})

    def providers_with(self, options: dict[str, str]) -> list[Any]:
        """`providers` of a GPU, with more options of its provider."""
        return [(PROVIDERS[self.type], {"device_id": str(self.index)} | options), PROVIDERS["cpu"]]


def load_session(
    file: Path,
    device: Device,
    *,
    threads: int | None = None,
    repeated: bool = False,
    fp8: bool = False,
    providers: list[Any] | None = None,
) -> Any:
    """An `InferenceSession` of the graph `file`.

    `threads`: threads inside an operator, None for all cores. `repeated`: the graph runs again as soon as it has run
    (a decode step), so its threads wait for work without sleeping. `fp8`: the graph has FP8 pairs of QuantizeLinear and
    DequantizeLinear, which ONNX Runtime would take for INT8 ones and fuse into operators that do not load. `providers`:
    other execution providers than those of `device`, the one that must start first in front.

    Raises DependencyError when ONNX Runtime or its provider for `device` is missing (it would fall back to the CPU
    silently), EngineError when the graph does not load.
    """
    ort = import_onnxruntime()
    providers = providers or device.providers
    provider = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if provider not in ort.get_available_providers():
        raise DependencyError(
            f"device {device.type!r} needs {provider}, but onnxruntime {ort.__version__} here has only "
            f"{', '.join(ort.get_available_providers())}; install onnxruntime-gpu or use the device cpu"
        )
    missing = preload_libraries() if device.type != "cpu" else ()
    options = _session_options(ort, device, threads, repeated=repeated)
    if fp8:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        # Else it tries other providers itself, and says so on stdout.
        session = ort.InferenceSession(str(file), options, providers=providers, enable_fallback=0)
    except onnxruntime_errors() as error:
        advice = "export the bundle again"
        if device.type != "cpu":
            advice = f"see `bridgeport doctor` for what {provider} lacks, use the device cpu, or {advice}"
        raise EngineError(f"{file} does not load: {first_line(error)}; {advice}") from error
    if session.get_providers()[0] != provider:
        raise DependencyError(_not_started(device, provider, missing))
    return session


def _not_started(device: Device, provider: str, missing: tuple[str, ...]) -> str:
    why = f"missing: {', '.join(missing)}" if missing else "a CUDA or cuDNN library is missing or too old"
    return (
        f"device {device.type!r}: {provider} did not start ({why}); install them (`pip install "
        "'onnxruntime-gpu[cuda,cudnn]'`), see `bridgeport doctor`, or use the device cpu"
    )


def _session_options(ort: Any, device: Device, threads: int | None, *, repeated: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors alone: they come as exceptions too
    if threads is not None:
        options.intra_op_num_threads = threads
    if not repeated:
        # Every session has threads of its own. Without this they go on spinning when the run is over, on the cores that
        # the next stage's threads need.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    # Weights behind a DequantizeLinear: without this their products round activations to INT8 too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if device.type == "cpu":
        options.add_session_config_entry("optimization.disable_specified_optimizers", ";".join(SLOW_FUSIONS))
    return options


@cache
def preload_libraries() -> tuple[str, ...]:
    """Load CUDA and cuDNN from NVIDIA's wheels, where ONNX Runtime looks only when it is asked to.

    Names of the libraries that are not there. It prints them, on the stdout that may be for JSON.
    """
    said = io.StringIO()
    with redirect_stdout(said):
        import_onnxruntime().preload_dlls()
    lines = [line for line in said.getvalue().splitlines() if line.startswith(_NOT_LOADED)]
    names = [Path(line.removeprefix(_NOT_LOADED).partition(":")[0]).name for line in lines]
    return tuple(dict.fromkeys(names))


def import_onnxruntime() -> Any:
    """The module `onnxruntime`; DependencyError says how to install it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            f"running a bundle needs onnxruntime ({error}); install it with `pip install 'bridgeport[cpu]'`"
        ) from error
    return onnxruntime


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """All exceptions that ONNX Runtime raises; they have no common base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (*own, RuntimeError, ValueError)


def first_line(error: Exception) -> str:
    """The first line of a message of ONNX Runtime, without its prefix of codes."""
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", str(error).strip().split("\n", 1)[0])
