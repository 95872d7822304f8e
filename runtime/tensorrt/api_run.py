"""The run side of the adapter: runtime, engine, context, addresses, enqueue, refit, weight streaming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .api_base import BaseApi, TensorInfo, dtype_name
from .versions import check_member

if TYPE_CHECKING:
    import tensorrt as trt  # type: ignore

Shape = tuple[int, ...]


class OutputMemory(Protocol):
    """Who gives memory to outputs whose size is known only while they are computed."""

    def allocate(self, name: str, address: int, size: int, alignment: int, stream: int) -> int:
        """Device address of at least `size` bytes, aligned; `address` is what it had before. 0: there is none."""

    def notify_shape(self, name: str, shape: Shape) -> None:
        """The shape that the output came to."""


class RunApi(BaseApi):
    """Plan to outputs. Streams and addresses are integers: `cudaStream_t` handles and device pointers."""

    def create_runtime(self, *, engine_host_code_allowed: bool = False) -> trt.Runtime:
        """A runtime. `engine_host_code_allowed`: a version-compatible plan may run the lean runtime that it carries.

        Check for a CUDA device before: without a driver the lean library hands out a runtime that then crashes.
        """
        self.log.errors.clear()
        fix = "running needs a CUDA device and its driver; see `bridgeport doctor`"
        try:
            runtime: trt.Runtime = self.trt.Runtime(self.logger)
        except TypeError as error:  # pybind11: "factory function returned nullptr"
            raise self._failed("TensorRT made no runtime", fix) from error
        runtime.engine_host_code_allowed = engine_host_code_allowed
        return runtime

    def deserialize(self, runtime: trt.Runtime, plan: bytes) -> trt.ICudaEngine:
        """The engine of a plan. A plan is executable code: check where it comes from before this call."""
        self.log.errors.clear()
        engine: trt.ICudaEngine = runtime.deserialize_cuda_engine(plan)
        self._check(engine, "the engine does not load", "build it on this machine with `bridgeport build`")
        return engine

    # Engine

    def tensors(self, engine: trt.ICudaEngine) -> list[TensorInfo]:
        """Every input and output, in the engine's order."""
        return [self._tensor(engine, engine.get_tensor_name(index)) for index in range(engine.num_io_tensors)]

    def _tensor(self, engine: trt.ICudaEngine, name: str) -> TensorInfo:
        mode: trt.TensorIOMode = engine.get_tensor_mode(name)
        location: trt.TensorLocation = engine.get_tensor_location(name)
        dtype = dtype_name(engine.get_tensor_dtype(name))
        return TensorInfo(name, mode.name.lower(), dtype, tuple(engine.get_tensor_shape(name)), location.name.lower())

    def num_profiles(self, engine: trt.ICudaEngine) -> int:
        """How many optimization profiles the engine was built with."""
        return int(engine.num_optimization_profiles)

    def profile_shapes(self, engine: trt.ICudaEngine, name: str, profile: int) -> tuple[Shape, Shape, Shape]:
        """(min, opt, max) shape of an input in a profile."""
        low, best, high = engine.get_tensor_profile_shape(name, profile)
        return tuple(low), tuple(best), tuple(high)

    def device_memory_size(self, engine: trt.ICudaEngine, profile: int | None = None) -> int:
        """Bytes of activations that a context needs: the largest of all profiles, or those of one."""
        if profile is None:
            return int(engine.device_memory_size_v2)
        return int(engine.get_device_memory_size_for_profile_v2(profile))

    def engine_information(self, engine: trt.ICudaEngine) -> dict[str, Any]:
        """What the inspector tells: `Layers`, and `Bindings`, under which 11 has `I/O Tensors` too."""
        inspector: trt.EngineInspector = engine.create_engine_inspector()
        told = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        information: dict[str, Any] = json.loads(told)
        if self.has("inspector_io_tensors") and "I/O Tensors" in information:
            information["Bindings"] = information["I/O Tensors"]
        return information

    def num_layers(self, engine: trt.ICudaEngine) -> int:
        """Layers after fusion."""
        return int(engine.num_layers)

    def weights_size(self, engine: trt.ICudaEngine) -> int | None:
        """Bytes of all weights; None where this version does not tell."""
        if self.has("engine_stat"):
            return int(engine.get_engine_stat(self.trt.EngineStat.TOTAL_WEIGHTS_SIZE))
        return None

    def streamable_weights_size(self, engine: trt.ICudaEngine) -> int:
        """Bytes of weights that can stay on the host; 0 if it was built without WEIGHT_STREAMING."""
        return int(engine.streamable_weights_size)

    def set_weight_streaming_budget(self, engine: trt.ICudaEngine, budget: int | None = None) -> int:
        """Bytes of streamable weights that stay on the device; None: TensorRT's choice. Before any context is made.

        With streaming, `execute` waits for the device and cannot be captured into a CUDA graph.
        """
        chosen = int(engine.get_weight_streaming_automatic_budget()) if budget is None else budget
        engine.weight_streaming_budget_v2 = chosen
        return int(engine.weight_streaming_budget_v2)

    def refit(self, engine: trt.ICudaEngine, path: Path) -> None:
        """Put the weights of an ONNX file into an engine built with REFIT or STRIP_PLAN.

        With REFIT_IDENTICAL they must be the ones that it was built from: others compute something undefined.
        """
        self.log.errors.clear()
        refitter: trt.Refitter = self.trt.Refitter(engine, self.logger)
        parser: trt.OnnxParserRefitter = self.trt.OnnxParserRefitter(refitter, self.logger)
        fix = "refit with the ONNX file that it was built from"
        self._check(parser.refit_from_file(str(path)), f"weights of {path.name} do not fit the engine", fix)
        missing = list(refitter.get_missing_weights())
        self._check(not missing, f"{len(missing)} weights are not in {path.name}, the first is {missing[:1]}", fix)
        self._check(refitter.refit_cuda_engine(), f"weights of {path.name} were not taken", fix)
        if self.has("release_refit_resources"):
            refitter.release_refit_resources()

    def serialize(self, engine: trt.ICudaEngine, *, weights: bool = True) -> bytes:
        """The plan of a loaded engine: after a refit with `weights`, it needs no refit any more."""
        self.log.errors.clear()
        config: trt.ISerializationConfig = engine.create_serialization_config()
        if weights:
            config.clear_flag(self.trt.SerializationFlag.EXCLUDE_WEIGHTS)
        else:
            config.set_flag(self.trt.SerializationFlag.EXCLUDE_WEIGHTS)
        plan = engine.serialize_with_config(config)
        self._check(plan, "the engine was not serialised")
        return bytes(memoryview(plan))

    # Context

    def create_context(self, engine: trt.ICudaEngine, strategy: str = "STATIC") -> trt.IExecutionContext:
        """A context: one per thread and profile. USER_MANAGED: call `set_device_memory` before it runs."""
        check_member(self.version, "ExecutionContextAllocationStrategy", strategy)
        self.log.errors.clear()
        chosen: trt.ExecutionContextAllocationStrategy = getattr(self.trt.ExecutionContextAllocationStrategy, strategy)
        context: trt.IExecutionContext = engine.create_execution_context(chosen)
        fix = "free device memory, or share it between stages"
        self._check(context, "the engine made no execution context", fix)
        return context

    def set_device_memory(self, context: trt.IExecutionContext, address: int, size: int) -> None:
        """Memory for activations, the caller's, aligned to 256 bytes; no two contexts may run in it at once."""
        context.set_device_memory(address, size)

    def update_device_memory_size(self, context: trt.IExecutionContext) -> int:
        """Bytes that the shapes set now need; less than the profile's with RUNTIME_ACTIVATION_RESIZE_10_10."""
        return int(context.update_device_memory_size_for_shapes())

    def set_profile(self, context: trt.IExecutionContext, profile: int, stream: int) -> None:
        """Switch to a profile on `stream`: first of all, since it forgets the input shapes."""
        self.log.errors.clear()
        what, fix = f"profile {profile} was not chosen", "use one that the engine has and no other context uses"
        try:
            self._check(context.set_optimization_profile_async(profile, stream), what, fix)
        except RuntimeError as error:  # the binding raises here, where the others give False
            raise self._failed(what, fix) from error

    def active_profile(self, context: trt.IExecutionContext) -> int:
        """Index of the profile that is chosen, -1 for none."""
        return int(context.active_optimization_profile)

    def set_input_shape(self, context: trt.IExecutionContext, name: str, shape: Shape) -> None:
        """Second, after the profile: the shape of each input. EngineError outside the profile."""
        self.log.errors.clear()
        done = context.set_input_shape(name, tuple(shape))
        self._check(done, f"{name} of shape {list(shape)} is refused", "use a shape inside the profile")

    def infer_shapes(self, context: trt.IExecutionContext) -> list[str]:
        """Names of the inputs that lack a shape or a value; empty when output shapes are known.

        EngineError when no shapes of the network fit those of the inputs.
        """
        self.log.errors.clear()
        try:
            return list(context.infer_shapes())
        except RuntimeError as error:  # "infer_shapes error code: -1"
            fix = "the shapes of the inputs contradict each other: give those of one batch and sequence"
            raise self._failed("output shapes are not known", fix) from error

    def tensor_shape(self, context: trt.IExecutionContext, name: str) -> Shape:
        """The shape at the input shapes set now; -1 for an axis that depends on data."""
        return tuple(context.get_tensor_shape(name))

    def max_output_size(self, context: trt.IExecutionContext, name: str) -> int:
        """Bytes that an output takes at most at the input shapes set now."""
        return int(context.get_max_output_size(name))

    def set_address(self, context: trt.IExecutionContext, name: str, address: int) -> None:
        """Third: device address of an input or output, host address of a tensor in host memory."""
        self.log.errors.clear()
        done = context.set_tensor_address(name, address)
        self._check(done, f"the address of {name} is refused", "pass an address of an input or output of the engine")

    def set_output_memory(
        self, context: trt.IExecutionContext, name: str, memory: OutputMemory
    ) -> trt.IOutputAllocator:
        """Instead of an address, for an output whose size depends on data. Keep what is returned while it runs."""
        allocator: trt.IOutputAllocator = self._create_allocator(memory)
        done = context.set_output_allocator(name, allocator)
        self._check(done, f"the allocator of {name} is refused", "pass the name of an output of the engine")
        return allocator

    def execute(self, context: trt.IExecutionContext, stream: int) -> None:
        """Last: enqueue on a stream that is not the default one. Outputs are there when the stream has come so far."""
        self.log.errors.clear()
        self._check(context.execute_async_v3(stream), "the engine does not run", "set profile, shapes and addresses")

    def set_profiler(self, context: trt.IExecutionContext, report: Callable[[str, float], None]) -> trt.IProfiler:
        """Report (layer, milliseconds) after each run. Keep what is returned while it runs; it slows the run down."""
        profiler: trt.IProfiler = self._create_profiler(report)
        context.profiler = profiler
        return profiler

    def _create_profiler(self, report: Callable[[str, float], None]) -> trt.IProfiler:
        module = self.trt

        class Profiler(module.IProfiler):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                module.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                report(layer_name, ms)

        return Profiler()

    def _create_allocator(self, owner: OutputMemory) -> trt.IOutputAllocator:
        module = self.trt

        class Allocator(module.IOutputAllocator):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                module.IOutputAllocator.__init__(self)

            def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
                return owner.allocate(tensor_name, memory, size, alignment, 0)

            def reallocate_output_async(
                self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
            ) -> int:
                return owner.allocate(tensor_name, memory, size, alignment, stream)

            def notify_shape(self, tensor_name: str, shape: trt.Dims) -> None:
                owner.notify_shape(tensor_name, tuple(shape))

        return Allocator()
