#!/usr/bin/env python3
"""Build TensorRT engines from the ONNX graphs beside this file, and check them against recorded outputs.

    python3 build_and_check.py              builds what is not built yet, checks every engine; status 1 when one fails
    python3 build_and_check.py --build-only
    python3 build_and_check.py --stage llm  this stage alone

Needs Python 3.10 or newer with numpy and TensorRT 10.3 or newer, as JetPack 6.2 has them (apt install
python3-libnvinfer python3-numpy), and nothing else: memory comes from the driver's own library.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # Python looks for modules beside a script first: what was added to the archive would run.
    _here = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120 - pathlib is not imported yet
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != _here]

import argparse
import ctypes
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tensorrt as trt  # type: ignore

HERE = Path(__file__).resolve().parent
OLDEST = (10, 3)
MIB = 1 << 20
DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


class Problem(Exception):  # noqa: N818 - what stops the run, told in one line
    """Something that stops the run."""


class Cuda:
    """Device memory and a stream, through the driver's library."""

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self.driver = ctypes.CDLL(library)
        except OSError as error:
            raise Problem(f"there is no NVIDIA driver here: {error}") from error
        self.call("cuInit", 0)
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreate", ctypes.byref(stream), 1)  # 1: does not wait for the default stream
        self.stream = int(stream.value or 0)

    def call(self, function: str, *arguments: object) -> None:
        status = getattr(self.driver, function)(*arguments)
        if status != 0:
            raise Problem(f"the NVIDIA driver refuses {function}: CUDA error {status}")

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return pointer.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: np.ndarray) -> None:
        if array.nbytes:
            self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), _pointer(array), ctypes.c_size_t(array.nbytes))

    def download(self, array: np.ndarray, address: int) -> None:
        if array.nbytes:
            self.call("cuMemcpyDtoH_v2", _pointer(array), ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))

    def wait(self) -> None:
        self.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Board:
    """TensorRT's module, used by names that 10.3 and 11.4 both have; flags and enums by name, never by number."""

    def __init__(self, module: Any) -> None:
        self.trt = module
        self.logger: trt.Logger = self.trt.Logger(self.trt.Logger.WARNING)

    def build(self, job: dict[str, Any], root: Path) -> bytes:
        """The plan of one stage."""
        builder: trt.Builder = self.trt.Builder(self.logger)
        network: trt.INetworkDefinition = builder.create_network(
            1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        )
        config: trt.IBuilderConfig = builder.create_builder_config()
        self.configure(config, job)
        parser: trt.OnnxParser = self.trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(root / job["graph"])):
            error: trt.ParserError = parser.get_error(0)
            raise Problem(f"{job['graph']} is not taken: {error.desc()} (node {error.node()})")
        for shapes in job["profiles"]:
            profile: trt.IOptimizationProfile = builder.create_optimization_profile()
            try:
                for name, (low, best, high) in shapes.items():
                    profile.set_shape(name, tuple(low), tuple(best), tuple(high))
                taken = config.add_optimization_profile(profile) >= 0
            except (RuntimeError, ValueError):  # what the bindings raise where TensorRT refuses
                taken = False
            if not taken:
                raise Problem(f"{job['stage']}: TensorRT refuses a profile: {shapes}")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise Problem(
                f"{job['stage']}: not built, see the messages above; when memory ran out, end other programs and build "
                f"one stage at a time (--stage {job['stage']}), or pack again with smaller --profile or --workspace"
            )
        return bytes(memoryview(plan))

    def configure(self, config: trt.IBuilderConfig, job: dict[str, Any]) -> None:
        if job["tf32"]:
            config.set_flag(self.trt.BuilderFlag.TF32)
        else:
            config.clear_flag(self.trt.BuilderFlag.TF32)
        for name in job["flags"]:
            config.set_flag(getattr(self.trt.BuilderFlag, name))
        config.builder_optimization_level = job["optimization_level"]
        for name, size in job["pools_mib"].items():
            config.set_memory_pool_limit(getattr(self.trt.MemoryPoolType, name), size * MIB)
        if job["hardware_compatibility"] != "NONE":
            level: trt.HardwareCompatibilityLevel = getattr(
                self.trt.HardwareCompatibilityLevel, job["hardware_compatibility"]
            )
            config.hardware_compatibility_level = level

    def load(self, plan: bytes, job: dict[str, Any], root: Path) -> trt.ICudaEngine:
        """The engine of a plan that was built here; weights that were left out come from the graph."""
        runtime: trt.Runtime = self.trt.Runtime(self.logger)
        runtime.engine_host_code_allowed = "VERSION_COMPATIBLE" in job["flags"]
        engine: trt.ICudaEngine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise Problem(f"{job['stage']}: the engine does not load; remove it and build it again")
        if "STRIP_PLAN" in job["flags"]:
            refitter: trt.Refitter = self.trt.Refitter(engine, self.logger)
            weights: trt.OnnxParserRefitter = self.trt.OnnxParserRefitter(refitter, self.logger)
            if not weights.refit_from_file(str(root / job["graph"])) or not refitter.refit_cuda_engine():
                raise Problem(f"{job['stage']}: the weights of {job['graph']} do not fit the engine")
        return engine

    def run(self, engine: trt.ICudaEngine, cuda: Cuda, profile: int, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
        """All outputs. In TensorRT's order: profile, shapes, addresses, enqueue."""
        context: trt.IExecutionContext = engine.create_execution_context()
        try:
            chosen = context is not None and context.set_optimization_profile_async(profile, cuda.stream)
        except RuntimeError:  # what the bindings raise where TensorRT refuses
            chosen = False
        if not chosen:
            raise Problem(f"profile {profile} cannot be chosen, or there is no memory for the engine")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        arrays: dict[str, np.ndarray] = {}
        for name in names:
            if engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT:
                if not context.set_input_shape(name, inputs[name].shape):
                    raise Problem(f"{name} of shape {list(inputs[name].shape)} lies outside of profile {profile}")
                arrays[name] = np.ascontiguousarray(inputs[name])
        for name in names:
            if name not in arrays:
                dtype: trt.DataType = engine.get_tensor_dtype(name)
                arrays[name] = np.empty(tuple(context.get_tensor_shape(name)), DTYPES[dtype.name])
        memory = {name: cuda.allocate(array.nbytes) for name, array in arrays.items()}
        try:
            for name, address in memory.items():
                if name in inputs:
                    cuda.upload(address, arrays[name])
                context.set_tensor_address(name, address)
            if not context.execute_async_v3(cuda.stream):
                raise Problem("the engine does not run, see the messages above")
            cuda.wait()
            outputs = {name: array for name, array in arrays.items() if name not in inputs}
            for name, array in outputs.items():
                cuda.download(array, memory[name])
        finally:
            for address in memory.values():
                cuda.free(address)
        return outputs


def compare(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """(least cosine of a row of the last axis, largest difference); a NaN or infinity that is new gives (-1, inf)."""
    if found.shape != expected.shape:
        raise Problem(f"an output is {list(found.shape)}, recorded is {list(expected.shape)}")
    if expected.size == 0:
        return 1.0, 0.0
    a, b = (array.astype(np.float64).reshape(-1, max(array.shape[-1:] or (1,))) for array in (found, expected))
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return -1.0, float("inf")
    a, b = (np.where(np.isfinite(array), array, 0.0) for array in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = (np.abs(a).max(axis=1) == 0) & (np.abs(b).max(axis=1) == 0)
    cosine = np.where(both_zero, 1.0, (a * b).sum(axis=1) / np.where(norms == 0, 1.0, norms))
    return float(cosine.min()), float(np.abs(a - b).max())


def verify_files(root: Path) -> None:
    """Every file against SHA256SUMS, before any of them is used."""
    lines = (root / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    for line in lines:
        expected, _, name = line.partition("  ")
        if not (root / name).is_file():
            raise Problem(f"{name} is missing; unpack the archive again")
        if sha256(root / name) != expected:
            raise Problem(f"{name} was changed (its SHA-256 is not that of SHA256SUMS); unpack the archive again")


def sha256(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class Built:
    """Engines that were built on this machine: SHA-256 -> TensorRT's version.

    An engine is executable code, so one is loaded only when it is known to come from here; what says so lies outside
    of the archive, which could bring both.
    """

    def __init__(self, root: Path, tensorrt: str) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bridgeport" / "packed"
        self.file = cache / f"{sha256(root / 'SHA256SUMS')}.json"
        self.tensorrt = tensorrt

    def read(self) -> dict[str, str]:
        try:
            return dict(json.loads(self.file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def holds(self, plan: Path) -> bool:
        return plan.is_file() and self.read().get(sha256(plan)) == self.tensorrt

    def add(self, plan: Path) -> None:
        text = json.dumps({**self.read(), sha256(plan): self.tensorrt}, indent=1)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            print(f"{self.file} cannot be written ({error}): the next run builds again")


def load_tensorrt() -> Any:
    """The module; JetPack's own has no place in a virtual environment without system packages."""
    try:
        import tensorrt
    except ImportError as error:
        raise Problem(
            f"TensorRT's Python module does not load ({error}); apt install python3-libnvinfer, and run outside of "
            "virtual environments"
        ) from error
    if tuple(int(part) for part in tensorrt.__version__.split(".")[:2]) < OLDEST:
        raise Problem(f"TensorRT {tensorrt.__version__} is too old; 10.3 (JetPack 6.2) or newer is needed")
    return tensorrt


def build_stage(board: Board, job: dict[str, Any], root: Path, built: Built) -> Path:
    """Build one engine unless it is there; what is written is written whole."""
    plan = root / "engines" / f"{job['stage']}.plan"
    if built.holds(plan):
        print(f"{job['stage']}: {plan.name} is there")
        return plan
    if plan.is_file():
        print(f"{job['stage']}: {plan.name} was not built here of these files by this TensorRT, and is replaced")
    print(f"{job['stage']}: building, this takes minutes", flush=True)
    data = board.build(job, root)
    plan.parent.mkdir(exist_ok=True)
    part = plan.with_suffix(".part")
    part.write_bytes(data)
    part.replace(plan)
    built.add(plan)
    print(f"{job['stage']}: {len(data) / 1e6:.1f} MB")
    return plan


def check_stage(board: Board, cuda: Cuda, job: dict[str, Any], plan: Path, root: Path) -> bool:
    """Run the recorded inputs, print a line per output, and say whether all are near enough."""
    engine = board.load(plan.read_bytes(), job, root)
    passed = True
    for number, case in enumerate(job["cases"]):
        inputs, expected = (
            {name: np.load(root / file) for name, file in case[side].items()} for side in ("inputs", "outputs")
        )
        found = board.run(engine, cuda, case["profile"], inputs)
        for name, array in expected.items():
            cosine, largest = compare(found[name], array)
            good = cosine >= job["min_cosine"]
            passed = passed and good
            if name in job["outputs"] or not good:  # a cache has an output per layer
                word = "ok" if good else f"FAILED (least {job['min_cosine']})"
                print(f"{job['stage']} case {number} {name}: cosine {cosine:.6f}, largest {largest:.2e}  {word}")
    print(f"{job['stage']}: {'passed' if passed else 'FAILED'}, {len(job['cases'])} recorded cases")
    return passed


def run(root: Path, stages: list[str], *, build_only: bool, cuda_library: str = "libcuda.so.1") -> bool:
    """Verify, build, check; True when every engine passed."""
    verify_files(root)
    document = json.loads((root / "pack.json").read_text(encoding="utf-8"))
    jobs = [job for job in document["stages"] if not stages or job["stage"] in stages]
    if unknown := set(stages) - {job["stage"] for job in document["stages"]}:
        raise Problem(f"there is no stage {', '.join(sorted(unknown))}; see pack.json")
    module = load_tensorrt()
    print(f"TensorRT {module.__version__}, packed for {document['device']}")
    cuda = Cuda(cuda_library)  # before TensorRT's own: without a device its library is not safe to call
    board = Board(module)
    built, passed = Built(root, module.__version__), True
    for job in jobs:
        plan = build_stage(board, job, root, built)
        passed = build_only or (check_stage(board, cuda, job, plan, root) and passed)
    return passed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the engines and check them against recorded outputs.")
    parser.add_argument("--build-only", action="store_true", help="build, and check nothing")
    parser.add_argument("--stage", action="append", default=[], help="this stage alone; may be repeated")
    chosen = parser.parse_args()
    try:
        return 0 if run(HERE, chosen.stage, build_only=chosen.build_only) else 1
    except Problem as problem:
        print(f"stopped: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
