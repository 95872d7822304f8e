"""Build side of the double: what Builder, OnnxParser, IBuilderConfig and their kin do. See `double.py`.

A class here holds the methods of the genuine class that are modelled. `read_x` and `write_x` serve property `x`,
`defaults` is what the other properties begin with.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar

import onnx
from tests.tensorrt.double_plan import Plan, inputs_of, read_cache, shape_of, strip_weights, write_cache

# Element type of ONNX -> member of DataType. DOUBLE is refused: the genuine parser casts it down with a warning.
DTYPES = {1: "FLOAT", 10: "HALF", 16: "BF16", 3: "INT8", 2: "UINT8", 6: "INT32", 7: "INT64", 9: "BOOL"}
# Operators of ai.onnx that 10.3 has no importer for, of those that our graphs may hold.
AFTER_10_3 = ("Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter")


def make(double: Any, name: str, *args: Any, **state: Any) -> Any:
    """An object of a class that has no constructor of its own."""
    cls = double.module.__dict__[name]
    made = cls.__new__(cls, *args)
    made.__dict__.update(_ready=True, **state)
    return made


def member(double: Any, enum: str, name: str) -> Any:
    """A member of one of the module's enums."""
    return getattr(double.module.__dict__[enum], name)


def say(double: Any, logger: Any, severity: str, text: str) -> None:
    """Log as TensorRT does, through the logger that the caller gave."""
    logger.log(getattr(double.module.__dict__["ILogger"], severity), text)


class Logger:
    defaults: ClassVar[dict[str, Any]] = {"min_severity": None}

    def __init__(self, min_severity: Any = None) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        pass


class IHostMemory:
    extends = (bytes,)

    def read_nbytes(self: Any) -> int:
        return len(self)


class Dims:
    def __init__(self: Any, shape: Any = ()) -> None:
        self.__dict__["_shape"] = tuple(int(size) for size in shape)

    def __len__(self: Any) -> int:
        return len(self._shape)

    def __getitem__(self: Any, index: Any) -> Any:
        return self._shape[index]


class ITensor:
    def read_name(self: Any) -> str:
        return str(self._value.name)

    def read_dtype(self: Any) -> Any:
        return member(self._double, "DataType", DTYPES[self._value.type.tensor_type.elem_type])

    def read_shape(self: Any) -> Any:
        dims = make(self._double, "Dims")
        dims.__dict__["_shape"] = shape_of(self._value)
        return dims

    def read_location(self: Any) -> Any:
        return member(self._double, "TensorLocation", "DEVICE")

    def get_dimension_name(self: Any, index: int) -> str:
        return str(self._value.type.tensor_type.shape.dim[index].dim_param)


class INetworkDefinition:
    defaults: ClassVar[dict[str, Any]] = {"name": ""}

    def get_input(self: Any, index: int) -> Any:
        return make(self._double, "ITensor", _value=inputs_of(self._model)[index])

    def get_output(self: Any, index: int) -> Any:
        return make(self._double, "ITensor", _value=self._model.graph.output[index])

    def read_num_inputs(self: Any) -> int:
        return len(inputs_of(self._model))

    def read_num_outputs(self: Any) -> int:
        return len(self._model.graph.output)

    def read_num_layers(self: Any) -> int:
        return len(self._model.graph.node)

    def get_flag(self: Any, flag: Any) -> bool:
        return bool(self._flags & (1 << int(flag)))


class ParserError:
    def code(self: Any) -> Any:
        return member(self._double, "ErrorCode", self._code)

    def desc(self: Any) -> str:
        return str(self._desc)

    def node(self: Any) -> int:
        return int(self._node)

    def node_name(self: Any) -> str:
        return str(self._node_name)

    def node_operator(self: Any) -> str:
        return str(self._operator)


class OnnxParser:
    def __init__(self: Any, network: Any, logger: Any) -> None:
        self.__dict__.update(_network=network, _logger=logger, _errors=[], _bad_nodes=[])

    def parse(self: Any, model: bytes, path: str | None = None) -> bool:
        return bool(self._take(bytes(model), Path(path) if path else None))

    def parse_from_file(self: Any, model: str) -> bool:
        if not Path(model).is_file():
            self._refuse("MODEL_DESERIALIZE_FAILED", f"Failed to open file: {model}")
            return False
        return bool(self._take(Path(model).read_bytes(), Path(model)))

    def supports_model_v2(self: Any, model: bytes, path: str | None = None) -> bool:
        proto = onnx.load_model_from_string(bytes(model))
        self.__dict__["_bad_nodes"] = self._unsupported(proto)
        return not self._bad_nodes

    def read_num_subgraphs(self: Any) -> int:
        return 2 if self._bad_nodes else 1

    def is_subgraph_supported(self: Any, index: int) -> bool:
        return not (self._bad_nodes and index == 1)

    def get_subgraph_nodes(self: Any, index: int) -> list[int]:
        return list(self._bad_nodes) if index == 1 else []

    def read_num_errors(self: Any) -> int:
        return len(self._errors)

    def get_error(self: Any, index: int) -> Any:
        return self._errors[index]

    def clear_errors(self: Any) -> None:
        self._errors.clear()

    def set_builder_config(self: Any, builder_config: Any) -> bool:
        return True

    def _take(self: Any, data: bytes, path: Path | None) -> bool:
        try:
            model = onnx.load_model_from_string(data)
        except Exception:  # noqa: BLE001 - protobuf's own error class is not public
            self._refuse("MODEL_DESERIALIZE_FAILED", "Failed to parse the ONNX model")
            return False
        external = any(tensor.external_data for tensor in model.graph.initializer)
        if external and path is None:
            self._refuse("MODEL_DESERIALIZE_FAILED", "Failed to open the external data file: no path was given")
            return False
        if external:
            onnx.external_data_helper.load_external_data_for_model(model, str(path.parent if path else ""))
        for index in self._unsupported(model):
            node = model.graph.node[index]
            why = f"No importer registered for op: {node.op_type}"
            self._refuse("UNSUPPORTED_NODE", why, index, node.name, node.op_type)
        if self._errors:
            return False
        self._network.__dict__["_model"] = model
        return True

    def _unsupported(self: Any, model: Any) -> list[int]:
        late = AFTER_10_3 if self._double.version == "10.3" else ()
        nodes = enumerate(model.graph.node)
        return [at for at, node in nodes if node.domain not in ("", "ai.onnx") or node.op_type in late]

    def _refuse(self: Any, code: str, why: str, node: int = -1, name: str = "", operator: str = "") -> None:
        state = {"_code": code, "_desc": why, "_node": node, "_node_name": name, "_operator": operator}
        self._errors.append(make(self._double, "ParserError", **state))
        say(self._double, self._logger, "ERROR", f"ModelImporter.cpp: {why}")


class IOptimizationProfile:
    defaults: ClassVar[dict[str, Any]] = {"extra_memory_target": 1.0}

    def set_shape(self: Any, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002 - the genuine names
        low, best, high = (tuple(int(size) for size in shape) for shape in (min, opt, max))
        ordered = len(low) == len(best) == len(high)
        if not ordered or not all(0 <= a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise RuntimeError("Shape provided for opt or max is inconsistent with other shapes.")
        self._shapes[input] = (low, best, high)

    def get_shape(self: Any, input: str) -> list[Any]:  # noqa: A002
        return [self._double.module.Dims(shape) for shape in self._shapes[input]]


class ITimingCache:
    def serialize(self: Any) -> Any:
        return make(self._double, "IHostMemory", write_cache(self._content))

    def combine(self: Any, input_cache: Any, ignore_mismatch: bool) -> bool:
        mine, other = self._content, input_cache._content
        if not ignore_mismatch and (mine["sm"], mine["version"]) != (other["sm"], other["version"]):
            return False
        mine["entries"].update(other["entries"])
        return True

    def reset(self: Any) -> bool:
        self._content["entries"].clear()
        return True


class IBuilderConfig:
    defaults: ClassVar[dict[str, Any]] = {
        "avg_timing_iterations": 1,
        "builder_optimization_level": 3,
        "max_aux_streams": -1,
        "plugins_to_serialize": [],
        "progress_monitor": None,
    }

    def set_flag(self: Any, flag: Any) -> None:
        self._flags.add(flag.name)

    def clear_flag(self: Any, flag: Any) -> None:
        self._flags.discard(flag.name)

    def get_flag(self: Any, flag: Any) -> bool:
        return flag.name in self._flags

    def set_memory_pool_limit(self: Any, pool: Any, pool_size: int) -> None:
        self._pools[pool.name] = int(pool_size)

    def get_memory_pool_limit(self: Any, pool: Any) -> int:
        return int(self._pools.get(pool.name, 8 << 30))

    def set_preview_feature(self: Any, feature: Any, enable: bool) -> None:
        self._previews[feature.name] = enable

    def add_optimization_profile(self: Any, profile: Any) -> int:
        self._profiles.append(dict(profile._shapes))
        return len(self._profiles) - 1

    def read_num_optimization_profiles(self: Any) -> int:
        return len(self._profiles)

    def create_timing_cache(self: Any, serialized_timing_cache: bytes) -> Any:
        data = bytes(serialized_timing_cache)
        content = read_cache(data) if data else {"version": self._double.version, "sm": self._double.sm, "entries": {}}
        if content is None:
            say(self._double, self._logger, "ERROR", "createTimingCache: Error Code 3: the verification header fails")
            return None
        return make(self._double, "ITimingCache", _content=content)

    def set_timing_cache(self: Any, cache: Any, ignore_mismatch: bool) -> bool:
        here = (self._double.version, self._double.sm)
        if not ignore_mismatch and (cache._content["version"], cache._content["sm"]) != here:
            say(self._double, self._logger, "ERROR", "setTimingCache: the cache is of another device or version")
            return False
        self.__dict__["_cache"] = cache
        return True

    def get_timing_cache(self: Any) -> Any:
        return self.__dict__.get("_cache")


class Builder:
    defaults: ClassVar[dict[str, Any]] = {"max_threads": 1}

    def __init__(self: Any, logger: Any) -> None:
        if self._double.no_device:
            say(self._double, logger, "ERROR", "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.__dict__["_logger"] = logger

    def create_network(self: Any, flags: int = 0) -> Any:
        return make(self._double, "INetworkDefinition", _flags=int(flags), _model=onnx.ModelProto())

    def create_builder_config(self: Any) -> Any:
        state: dict[str, Any] = {"_profiles": [], "_pools": {}, "_previews": {}, "_logger": self._logger}
        return make(self._double, "IBuilderConfig", _flags={"TF32"}, **state)  # on by default, as it is in TensorRT

    def create_optimization_profile(self: Any) -> Any:
        return make(self._double, "IOptimizationProfile", _shapes={})

    def build_serialized_network(self: Any, network: Any, config: Any) -> Any:
        problem = self._double.fail_build or self._problem(network, config)
        if problem is None and not self._report_progress(config):
            problem = "Error Code 10: the build was stopped by the progress monitor"
        if problem is not None:
            say(self._double, self._logger, "ERROR", problem)
            return None
        self._fill_cache(network, config)
        return make(self._double, "IHostMemory", self._plan(network, config).to_bytes())

    def _problem(self: Any, network: Any, config: Any) -> str | None:
        if not network._model.graph.output:
            return "Error Code 4: API Usage Error (Network must have at least one output)"
        if "EXCLUDE_LEAN_RUNTIME" in config._flags and "VERSION_COMPATIBLE" not in config._flags:
            return "Error Code 4: API Usage Error (kEXCLUDE_LEAN_RUNTIME needs kVERSION_COMPATIBLE)"
        strongly_typed = self._double.version == "11.4" or network._flags & 2
        if "WEIGHT_STREAMING" in config._flags and not strongly_typed:
            return "Error Code 4: API Usage Error (kWEIGHT_STREAMING needs a strongly typed network)"
        for value in inputs_of(network._model):
            shape = shape_of(value)
            if -1 in shape and not config._profiles:
                return "Network has dynamic or shape inputs, but no optimization profile has been defined."
            for profile in config._profiles:
                if -1 in shape and value.name not in profile:
                    return f"Optimization profile 0 has no shapes for the dynamic input {value.name}"
                for chosen in profile.get(value.name, ()):
                    fits = zip(chosen, shape, strict=False)
                    if len(chosen) != len(shape) or any(want not in (-1, got) for got, want in fits):
                        return f"{value.name}: profile dimensions {chosen} do not match network dimensions {shape}"
        if "ERROR_ON_TIMING_CACHE_MISS" in config._flags and set(_cache_keys(network)) - self._entries(config).keys():
            return "Error Code 10: a tactic is not in the timing cache and kERROR_ON_TIMING_CACHE_MISS is set"
        return None

    def _entries(self: Any, config: Any) -> Any:
        cache = config.__dict__.get("_cache")
        return cache._content["entries"] if cache is not None else {}

    def _fill_cache(self: Any, network: Any, config: Any) -> None:
        if config.__dict__.get("_cache") is None:
            config.__dict__["_cache"] = config.create_timing_cache(b"")
        config._cache._content["entries"].update(dict.fromkeys(_cache_keys(network), 1.0))

    def _report_progress(self: Any, config: Any) -> bool:
        monitor = config.progress_monitor
        if monitor is None:
            return True
        phases = (("Building Engine", ""), ("Timing graph nodes", "Building Engine"))
        going = True
        for phase, parent in phases:
            monitor.phase_start(phase, parent, self._double.build_steps)
        for step in range(self._double.build_steps):
            if self._double.on_step is not None:
                self._double.on_step("Timing graph nodes", step)
            going = going and bool(monitor.step_complete("Timing graph nodes", step))
            if not going:
                break
        for phase, _ in reversed(phases):
            monitor.phase_finish(phase)
        return going

    def _plan(self: Any, network: Any, config: Any) -> Plan:
        model, level = network._model, config.__dict__.get("_values", {}).get("hardware_compatibility_level")
        header = {
            "version": self._double.version,
            "sm": self._double.sm,
            "hardware_compatibility": level.name if level is not None else "NONE",
            "flags": sorted(config._flags),
            "strongly_typed": bool(self._double.version == "11.4" or network._flags & 2),
            "profiles": config._profiles or [{}],
            "pools": config._pools,
            "num_layers": len(model.graph.node),
        }
        if "STRIP_PLAN" in config._flags:
            model = onnx.ModelProto.FromString(model.SerializeToString())
            header["stripped"] = strip_weights(model)
        return Plan(header, model.SerializeToString())


def _cache_keys(network: Any) -> list[str]:
    return [hashlib.sha256(node.SerializeToString()).hexdigest()[:16] for node in network._model.graph.node]


BUILD_BEHAVIOURS: dict[str, type] = {
    "Builder": Builder,
    "Dims": Dims,
    "IBuilderConfig": IBuilderConfig,
    "IHostMemory": IHostMemory,
    "ILogger": Logger,
    "INetworkDefinition": INetworkDefinition,
    "IOptimizationProfile": IOptimizationProfile,
    "ITensor": ITensor,
    "ITimingCache": ITimingCache,
    "Logger": Logger,
    "OnnxParser": OnnxParser,
    "ParserError": ParserError,
}
