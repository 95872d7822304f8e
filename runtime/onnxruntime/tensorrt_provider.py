"""Stages through ONNX Runtime's TensorRT provider; what it cannot take runs on the CUDA provider.

The provider builds an engine for a graph when it is loaded and keeps it in a cache. It is linked against one major
version of TensorRT (the one of onnxruntime-gpu 1.31 against 10), which is looked up before a session is made: without
it ONNX Runtime would fall back to another provider with a line in its log.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...bundle import Bundle
from ...errors import DependencyError, InputError
from ...models.contract import StageContract
from ..backends import EngineOptions
from ..engine import Engine
from .loader import Device, import_onnxruntime, load_session
from .runner import OnnxRuntimeEngine

__all__ = ["check_tensorrt", "load_engine", "load_engines", "provider_options", "why_not"]

logger = logging.getLogger(__name__)

PROVIDER = "TensorrtExecutionProvider"
WORKSPACE = 1 << 30  # bytes that a tactic may use while the engine is built and run
_LIBRARY = "libonnxruntime_providers_tensorrt.so"
_VERSIONS = (8, 10, 11)  # major versions of TensorRT to look for when the wanted one is not there


def load_engines(bundle: Bundle, options: EngineOptions) -> dict[str, Engine]:
    """An engine per stage of `bundle`. Raises what `load_engine` does."""
    names = [stage.contract.name for stage in bundle.manifest.stages]
    return {name: load_engine(bundle, name, options) for name in names}


def load_engine(bundle: Bundle, stage: str, options: EngineOptions) -> Engine:
    """The engine of `stage` alone: the CUDA provider's, with a line in the log, where `why_not` has a reason.

    Raises InputError for another device than a GPU, DependencyError when the provider or its TensorRT is missing,
    EngineError when the graph does not load.
    """
    device = Device.parse(options.device)
    if device.type != "cuda":
        raise InputError(
            f"device {options.device!r}: the engine onnxruntime-tensorrt runs on a GPU; use cuda or cuda:N"
        )
    version = check_tensorrt()
    reason = why_not(bundle, stage)
    if reason is not None:
        from . import load_engine as load_on_cuda

        logger.info("%s runs on the CUDA provider: %s", stage, reason)
        return load_on_cuda(bundle, stage, options)
    record, graph = bundle.manifest.stage(stage), bundle.graph(stage)
    cache = cache_directory(bundle, stage, version)
    cache.mkdir(parents=True, exist_ok=True)
    settings = provider_options(record.contract, device, cache, precision=record.precision)
    session = load_session(graph, device, threads=options.threads, providers=[(PROVIDER, settings), *device.providers])
    return OnnxRuntimeEngine(record.contract, session, device)


def why_not(bundle: Bundle, stage: str) -> str | None:
    """Why the TensorRT provider does not run `stage`, None when it does."""
    if stage in ("llm", "llm_encoder", "cross_kv"):
        return "the language model's cache is written in place, by operators that TensorRT lacks"
    if stage == "embed_tokens":
        return "it only looks rows up"
    record = bundle.manifest.stage(stage)
    if record.precision in ("fp32", "fp16"):
        return None
    if bundle.manifest.target != "tensorrt":
        return f"its {record.precision} is made for {bundle.manifest.target}; quantise it for tensorrt"
    if record.precision != "int8":
        return f"its {record.precision} needs a strongly typed network, which the engine tensorrt builds"
    return None


def provider_options(
    contract: StageContract, device: Device, cache: Path, *, precision: str = "fp32", workspace: int = WORKSPACE
) -> dict[str, str]:
    """The provider's options for a stage: one optimization profile from the contract's axes, and the cache.

    `precision`: the stage's. The provider's networks are weakly typed, and TensorRT 10 refuses one that holds FP16 or
    INT8 without the flag for it (NVIDIA/TensorRT issue 3277: "fp16 is not configured in the builder"); what is INT8 for
    TensorRT is FP16 elsewhere. The FP16 flag lets it compute FP32 parts in FP16 too. The INT8 flag makes nothing else
    INT8, there being no calibration table.
    Names and format of the profile are those in onnxruntime-gpu 1.31's library.
    """
    options = {
        "device_id": str(device.index),
        "trt_max_workspace_size": str(workspace),
        "trt_fp16_enable": str(precision != "fp32"),
        "trt_bf16_enable": "False",
        "trt_int8_enable": str(precision == "int8"),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
    }
    if contract.axes:
        for bound in ("min", "opt", "max"):
            sizes = {axis.name: int(getattr(axis, bound)) for axis in contract.axes}
            options[f"trt_profile_{bound}_shapes"] = _shapes(contract, sizes)
    return options


def _shapes(contract: StageContract, sizes: dict[str, int]) -> str:
    """ "pixel_values:1x3x224x224,..." """
    return ",".join(
        f"{spec.name}:" + "x".join(str(sizes[dim] if isinstance(dim, str) else dim) for dim in spec.shape)
        for spec in contract.inputs
        if any(isinstance(dim, str) for dim in spec.shape)
    )


def cache_directory(bundle: Bundle, stage: str, tensorrt: str) -> Path:
    """Where the engines of `stage` are kept: another place for other files, another ONNX Runtime or TensorRT.

    The provider itself puts the GPU's compute capability into the names of its files.
    """
    ort = import_onnxruntime()
    parts = [f"{file.path}:{file.sha256}" for file in bundle.manifest.files]
    contract = bundle.manifest.stage(stage).contract.model_dump_json()
    key = hashlib.sha256("\n".join([*parts, contract, ort.__version__, tensorrt]).encode()).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME")
    home = Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache"
    return home / "bridgeport" / "onnxruntime-tensorrt" / key[:32] / stage


def check_tensorrt(home: Path | None = None) -> str:
    """The version of the TensorRT that the provider will use, loaded. `home`: ONNX Runtime's libraries.

    Raises DependencyError when ONNX Runtime has no TensorRT provider, or when the library that it is linked against is
    not there; the message names the one that is.
    """
    ort = import_onnxruntime()
    library = (home or Path(ort.__file__).parent / "capi") / _LIBRARY
    if PROVIDER not in ort.get_available_providers() or not library.is_file():
        raise DependencyError(
            f"the engine onnxruntime-tensorrt needs {PROVIDER}, which onnxruntime {ort.__version__} here lacks; "
            "install onnxruntime-gpu (its wheels for aarch64 have none), or use the engine onnxruntime"
        )
    wanted = linked_version(library)
    found = load_library(f"libnvinfer.so.{wanted}")
    # The provider needs the parser too, which in a wheel is no more on the loader's path than the other.
    if found is None or load_library(f"libnvonnxparser.so.{wanted}") is None:
        others = [f"libnvinfer.so.{major}" for major in _VERSIONS if major != wanted]
        here = next((name for name in others if load_library(name) is not None), "no TensorRT")
        here = here if found is None else f"libnvinfer.so.{wanted} without its ONNX parser"
        raise DependencyError(
            f"onnxruntime {ort.__version__} is linked against libnvinfer.so.{wanted}, found is {here}; install "
            f"TensorRT {wanted}.x beside it (`pip install 'tensorrt-cu13=={wanted}.*'`), or use the engine "
            "tensorrt or onnxruntime"
        )
    return found


def linked_version(library: Path) -> int:
    """The major version in the name of the TensorRT that `library` needs. DependencyError when it names none."""
    names = {int(major) for major in re.findall(rb"libnvinfer\.so\.(\d+)\0", library.read_bytes())}
    if len(names) != 1:
        raise DependencyError(f"{library} names no one TensorRT; install onnxruntime-gpu again")
    return names.pop()


def load_library(name: str) -> str | None:
    """Load a TensorRT library, from the loader's path or from its wheel; its version, or None when it is not there.

    A library that is loaded once is found by its name when the provider asks for it.
    """
    for place in (name, *(str(folder / name) for folder in _wheel_folders())):
        try:
            loaded: Any = ctypes.CDLL(place, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        try:
            return str(loaded.getInferLibVersion())
        except AttributeError:
            return name
    return None


def _wheel_folders() -> list[Path]:
    spec = find_spec("tensorrt_libs")
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec is not None else []
