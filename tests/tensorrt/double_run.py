"""Run side of the double: Runtime, engine, context; ONNX Runtime computes on the addresses. See `double.py`."""

from __future__ import annotations

import ctypes
import json
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
from tests.tensorrt.double_build import DTYPES, make, member, say
from tests.tensorrt.double_plan import Plan, inputs_of, named_dims, shape_of, strip_weights, weights_size

DATA_DEPENDENT = ("NonZero", "NonMaxSuppression", "Unique", "Compress")


class Runtime:
    defaults: ClassVar[dict[str, Any]] = {"engine_host_code_allowed": False, "max_threads": 1}

    def __init__(self: Any, logger: Any) -> None:
        if self._double.no_device:
            say(self._double, logger, "ERROR", "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.__dict__["_logger"] = logger

    def deserialize_cuda_engine(self: Any, serialized_engine: Any) -> Any:
        try:
            plan = Plan.from_bytes(bytes(serialized_engine))
        except ValueError as error:
            say(self._double, self._logger, "ERROR", str(error))
            return None
        problem = self._problem(plan.header)
        if problem is not None:
            say(self._double, self._logger, "ERROR", problem)
            return None
        return make(self._double, "ICudaEngine", **_engine_state(plan, self._logger))

    def _problem(self: Any, header: Any) -> str | None:
        built, here = header["version"], self._double.version
        compatible = "VERSION_COMPATIBLE" in header["flags"] and not (built > here)  # 10.x -> 11 yes, 11 -> 10 never
        if built != here and not compatible:
            return f"Error Code 1: Serialization (Version tag does not match: current {here}, engine {built})"
        lean = "VERSION_COMPATIBLE" in header["flags"] and "EXCLUDE_LEAN_RUNTIME" not in header["flags"]
        if lean and not self.engine_host_code_allowed:
            return "Error Code 9: the plan carries a lean runtime and engineHostCodeAllowed is not set"
        if header["sm"] != self._double.sm and header["hardware_compatibility"] != "AMPERE_PLUS":
            return f"Error Code 6: the engine plan file is built for compute {header['sm']}, not {self._double.sm}"
        return None


def _engine_state(plan: Plan, logger: Any) -> dict[str, Any]:
    model = onnx.load_model_from_string(plan.model)
    values = {value.name: value for value in (*inputs_of(model), *model.graph.output)}
    missing = set(plan.header.get("stripped", ()))
    state = {"_plan": plan, "_model": model, "_io": values, "_missing": missing, "_logger": logger}
    return {**state, "_session": None, "_contexts": 0}


class ICudaEngine:
    def read_num_io_tensors(self: Any) -> int:
        return len(self._io)

    def get_tensor_name(self: Any, index: int) -> str:
        return str(list(self._io)[index])

    def get_tensor_mode(self: Any, name: str) -> Any:
        if name not in self._io:
            return member(self._double, "TensorIOMode", "NONE")
        return member(self._double, "TensorIOMode", "INPUT" if name in self._inputs() else "OUTPUT")

    def get_tensor_dtype(self: Any, name: str) -> Any:
        return member(self._double, "DataType", DTYPES[self._io[name].type.tensor_type.elem_type])

    def get_tensor_shape(self: Any, name: str) -> Any:
        return _dims(self, shape_of(self._io[name]))

    def get_tensor_location(self: Any, name: str) -> Any:
        return member(self._double, "TensorLocation", "DEVICE")

    def read_num_optimization_profiles(self: Any) -> int:
        return len(self._plan.header["profiles"])

    def read_num_layers(self: Any) -> int:
        return len(self._model.graph.node)

    def read_refittable(self: Any) -> bool:
        return bool({"REFIT", "REFIT_IDENTICAL", "STRIP_PLAN"} & set(self._plan.header["flags"]))

    def get_tensor_profile_shape(self: Any, name: str, profile_index: int) -> list[Any]:
        return [_dims(self, shape) for shape in self._profile(profile_index, name)]

    def read_device_memory_size_v2(self: Any) -> int:
        return int(max(self._memory(index) for index in range(self.num_optimization_profiles)))

    def get_device_memory_size_for_profile_v2(self: Any, profile_index: int) -> int:
        return int(self._memory(profile_index))

    def get_engine_stat(self: Any, stat: Any = None) -> int:
        return weights_size(self._model)

    def read_streamable_weights_size(self: Any) -> int:
        return weights_size(self._model) if "WEIGHT_STREAMING" in self._plan.header["flags"] else 0

    def get_weight_streaming_automatic_budget(self: Any) -> int:
        return int(self.streamable_weights_size) // 2

    def read_weight_streaming_budget_v2(self: Any) -> int:
        return int(self.__dict__.get("_values", {}).get("weight_streaming_budget_v2", self.streamable_weights_size))

    def write_weight_streaming_budget_v2(self: Any, value: int) -> None:
        if self._contexts or not 0 <= value <= self.streamable_weights_size:
            raise RuntimeError("Error setting weight streaming budget: contexts exist, or it is out of range")

    def create_engine_inspector(self: Any) -> Any:
        return make(self._double, "EngineInspector", _engine=self)

    def create_serialization_config(self: Any) -> Any:
        flags = {"EXCLUDE_WEIGHTS"} if "stripped" in self._plan.header else set()
        return make(self._double, "ISerializationConfig", _flags=flags)

    def serialize_with_config(self: Any, arg0: Any) -> Any:
        model = onnx.ModelProto.FromString(self._model.SerializeToString())
        header = {key: value for key, value in self._plan.header.items() if key != "stripped"}
        if "EXCLUDE_WEIGHTS" in arg0._flags:
            header["stripped"] = strip_weights(model)
        return make(self._double, "IHostMemory", Plan(header, model.SerializeToString()).to_bytes())

    def create_execution_context(self: Any, strategy: Any = None, runtime_config: Any = None) -> Any:
        self.__dict__["_contexts"] += 1
        name = strategy.name if strategy is not None else "STATIC"
        state: dict[str, Any] = {"_shapes": {}, "_addresses": {}, "_allocators": {}, "_memory": (0, 0)}
        return make(self._double, "IExecutionContext", _engine=self, _strategy=name, _profile=0, **state)

    def _inputs(self: Any) -> list[str]:
        return [value.name for value in inputs_of(self._model)]

    def _profile(self: Any, index: int, name: str) -> list[tuple[int, ...]]:
        shapes = self._plan.header["profiles"][index].get(name)
        return [tuple(shape) for shape in shapes] if shapes else [shape_of(self._io[name])] * 3

    def _memory(self: Any, index: int) -> int:
        """Some number that grows with the profile: four times the inputs at their maximum."""
        sizes = (4 * int(np.prod(self._profile(index, name)[2])) for name in self._inputs())
        return 256 * (1 + sum(sizes) * 4 // 256)

    def _run(self: Any, feeds: dict[str, Any], outputs: list[str]) -> list[Any]:
        if self._session is None:
            options = ort.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            data = self._model.SerializeToString()
            self.__dict__["_session"] = ort.InferenceSession(data, options, ["CPUExecutionProvider"])
        return list(self._session.run(outputs, feeds))


class ISerializationConfig:
    def set_flag(self: Any, flag: Any) -> bool:
        self._flags.add(flag.name)
        return True

    def clear_flag(self: Any, flag: Any) -> bool:
        self._flags.discard(flag.name)
        return True

    def get_flag(self: Any, flag: Any) -> bool:
        return flag.name in self._flags


class EngineInspector:
    def get_engine_information(self: Any, format: Any) -> str:  # noqa: A002 - the genuine name
        bindings = "I/O Tensors" if self._double.version == "11.4" else "Bindings"
        layers = [node.name or node.op_type for node in self._engine._model.graph.node]
        return json.dumps({"Layers": layers, bindings: list(self._engine._io)})


class Refitter:
    def __init__(self: Any, engine: Any, logger: Any) -> None:
        self.__dict__.update(_engine=engine, _logger=logger, _new={})

    def get_missing_weights(self: Any) -> list[str]:
        return sorted(self._engine._missing - self._new.keys())

    def refit_cuda_engine(self: Any) -> bool:
        if not self._engine.refittable or self.get_missing_weights():
            return False
        for tensor in self._engine._model.graph.initializer:
            if tensor.name in self._new:
                tensor.CopyFrom(self._new[tensor.name])
        self._engine._missing.clear()
        self._engine.__dict__["_session"] = None
        return True

    def release_refit_resources(self: Any) -> bool:
        return True


class OnnxParserRefitter:
    def __init__(self: Any, refitter: Any, logger: Any) -> None:
        self.__dict__.update(_refitter=refitter, _logger=logger)

    def refit_from_file(self: Any, model: str) -> bool:
        source = {tensor.name: tensor for tensor in onnx.load(model).graph.initializer}
        for tensor in self._refitter._engine._model.graph.initializer:
            other = source.get(tensor.name)
            if other is not None and list(other.dims) != list(tensor.dims):
                say(self._double, self._logger, "ERROR", f"weights {tensor.name}: count mismatch")
                return False
            if other is not None:
                self._refitter._new[tensor.name] = other
        return True


class IExecutionContext:
    defaults: ClassVar[dict[str, Any]] = {"profiler": None, "nvtx_verbosity": None, "enqueue_emits_profile": True}

    def read_engine(self: Any) -> Any:
        return self._engine

    def read_active_optimization_profile(self: Any) -> int:
        return int(self._profile)

    def set_device_memory(self: Any, memory: int, size: int) -> None:
        self.__dict__["_memory"] = (int(memory), int(size))

    def update_device_memory_size_for_shapes(self: Any) -> int:
        return int(self._engine._memory(self._profile))

    def set_optimization_profile_async(self: Any, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            self._refuse(f"setOptimizationProfileAsync: Error Code 3: {profile_index} is no profile")
            # pyCore.cpp: this one and infer_shapes raise, where the others give False.
            raise RuntimeError("Error in set optimization profile async.")
        self.__dict__["_profile"] = int(profile_index)
        self._shapes.clear()
        return True

    def set_input_shape(self: Any, name: str, shape: Any) -> bool:
        if name not in self._engine._inputs():
            return bool(self._refuse(f"setInputShape: Error Code 3: {name} is not an input"))
        low, _, high = self._engine._profile(self._profile, name)
        shape = tuple(int(size) for size in shape)
        if len(shape) != len(low):
            return bool(self._refuse(f"setInputShape: Error Code 3: {name} has rank {len(low)}, {len(shape)} came"))
        for axis, (size, least, most) in enumerate(zip(shape, low, high, strict=True)):
            if not least <= size <= most:
                told = f"Valid range for profile {self._profile}: [{least}]..[{most}]"
                text = f"Set dimension [{size}] for tensor {name} axis {axis} does not satisfy the profile. {told}"
                return bool(self._refuse(f"setInputShape: Error Code 3: API Usage Error ({text})"))
        self._shapes[name] = shape
        return True

    def infer_shapes(self: Any) -> list[str]:
        sizes: dict[str, int] = {}
        for name, dim, size in named_dims(self._engine._io, self._shapes):
            if sizes.setdefault(dim, size) != size:
                self._refuse(f"inferShapes: Error Code 7: {name}: {dim} is {size}, and {sizes[dim]} elsewhere")
                raise RuntimeError("infer_shapes error code: -1")
        return [
            name for name in self._engine._inputs() if -1 in shape_of(self._engine._io[name]) and not self._set(name)
        ]

    def get_tensor_shape(self: Any, name: str) -> Any:
        return _dims(self, self._shape(name))

    def get_max_output_size(self: Any, name: str) -> int:
        sizes = self._output_shapes() if self.infer_shapes() == [] else {}
        return int(np.prod(sizes[name])) * _dtype(self._engine, name).itemsize if name in sizes else -1

    def set_tensor_address(self: Any, name: str, memory: int) -> bool:
        if name not in self._engine._io:
            return bool(self._refuse(f"setTensorAddress: Error Code 3: {name} is not an input or output"))
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self: Any, name: str) -> int:
        return int(self._addresses.get(name, 0))

    def set_output_allocator(self: Any, name: str, output_allocator: Any) -> bool:
        if name in self._engine._inputs() or name not in self._engine._io:
            return False
        self._allocators[name] = output_allocator
        return True

    def report_to_profiler(self: Any) -> bool:
        return True

    def execute_async_v3(self: Any, stream_handle: int) -> bool:
        engine, (memory, size) = self._engine, self._memory
        needed = [name for name in engine._io if name not in self._allocators]
        missing = [name for name in needed if not self._addresses.get(name) and 0 not in self._shape(name)]
        if engine._missing:
            return bool(self._refuse("enqueueV3: Error Code 3: the weights of a stripped plan were not refitted"))
        if self.infer_shapes():
            return bool(self._refuse(f"enqueueV3: Error Code 3: {self.infer_shapes()[0]} has no shape"))
        if missing:
            return bool(self._refuse(f"enqueueV3: Error Code 3: no address is set for {missing[0]}"))
        if self._strategy == "USER_MANAGED" and (not memory or size < engine._memory(self._profile)):
            return bool(self._refuse("enqueueV3: Error Code 3: device memory is not set or is too small"))
        shapes = {name: self._shape(name) for name in engine._inputs()}
        addresses, allocators = dict(self._addresses), dict(self._allocators)

        def work() -> None:
            self._compute(shapes, addresses, allocators, int(stream_handle))

        if self._double.on_enqueue is not None:
            self._double.on_enqueue(int(stream_handle), work)
        else:
            work()
        return True

    def _compute(self: Any, shapes: Any, addresses: Any, allocators: Any, stream: int) -> None:
        engine = self._engine
        feeds = {}
        for name, shape in shapes.items():
            dtype = _dtype(engine, name)
            size = int(np.prod(shape)) * dtype.itemsize
            self._touch(addresses.get(name, 0), size, name)
            data = ctypes.string_at(addresses[name], size) if size else b""
            feeds[name] = np.frombuffer(data, dtype).reshape(shape)
        names = [name for name in engine._io if name not in shapes]
        for name, array in zip(names, engine._run(feeds, names), strict=True):
            array = np.ascontiguousarray(array)
            address = addresses.get(name, 0)
            if name in allocators:
                address = allocators[name].reallocate_output_async(name, address, array.nbytes, 256, stream)
                allocators[name].notify_shape(name, self._double.module.Dims(array.shape))
            if array.nbytes:
                self._touch(address, array.nbytes, name)
                ctypes.memmove(address, array.ctypes.data, array.nbytes)
        if self.profiler is not None:
            for node in engine._model.graph.node:
                self.profiler.report_layer_time(node.name or node.op_type, 0.001)

    def _touch(self: Any, address: int, size: int, name: str) -> None:
        if self._double.check_memory is not None:
            self._double.check_memory(address, size, name)

    def _set(self: Any, name: str) -> bool:
        return name in self._shapes

    def _shape(self: Any, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return tuple(self._shapes[name])
        fixed = shape_of(self._engine._io[name])
        if name in self._engine._inputs() or -1 not in fixed or self.infer_shapes():
            return fixed
        if any(node.op_type in DATA_DEPENDENT for node in self._engine._model.graph.node):
            return fixed
        return tuple(self._output_shapes()[name])

    def _output_shapes(self: Any) -> dict[str, tuple[int, ...]]:
        """What the outputs come to at these input shapes: by the names of the axes, else by computing on zeros."""
        key = tuple(sorted(self._shapes.items()))
        known = self.__dict__.setdefault("_known", {})
        if key not in known:
            known[key] = self._by_names() or self._by_zeros()
        return dict(known[key])

    def _by_names(self: Any) -> dict[str, tuple[int, ...]] | None:
        sizes = {dim: size for _, dim, size in named_dims(self._engine._io, self._shapes)}
        found: dict[str, tuple[int, ...]] = {}
        for value in self._engine._model.graph.output:
            dims = value.type.tensor_type.shape.dim
            if any(not dim.HasField("dim_value") and dim.dim_param not in sizes for dim in dims):
                return None
            found[value.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else sizes[dim.dim_param] for dim in dims
            )
        return found

    def _by_zeros(self: Any) -> dict[str, tuple[int, ...]]:
        engine = self._engine
        feeds = {name: np.zeros(self._shape(name), _dtype(engine, name)) for name in engine._inputs()}
        names = [value.name for value in engine._model.graph.output]
        return {name: array.shape for name, array in zip(names, engine._run(feeds, names), strict=True)}

    def _refuse(self: Any, text: str) -> bool:
        say(self._double, self._engine._logger, "ERROR", f"IExecutionContext::{text}")
        return False


def _dims(self: Any, shape: Any) -> Any:
    return make(self._double, "Dims", _shape=tuple(shape))


def _dtype(engine: Any, name: str) -> np.dtype[Any]:
    return onnx.helper.tensor_dtype_to_np_dtype(engine._io[name].type.tensor_type.elem_type)


RUN_BEHAVIOURS: dict[str, type] = {
    "EngineInspector": EngineInspector,
    "ICudaEngine": ICudaEngine,
    "IExecutionContext": IExecutionContext,
    "ISerializationConfig": ISerializationConfig,
    "OnnxParserRefitter": OnnxParserRefitter,
    "Refitter": Refitter,
    "Runtime": Runtime,
}
