"""The build side of the adapter: builder, network, parser, config, profiles, timing cache, plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .api_base import BaseApi, TensorInfo, dtype_name
from .versions import BUILDER_FLAGS, check_member

if TYPE_CHECKING:
    import tensorrt as trt  # type: ignore

Shape = tuple[int, ...]


class BuildProgress:
    """Callbacks of a build; subclass it. Steps may come from several threads, phases nest.

    An exception in a callback, KeyboardInterrupt too, stops the build; `build_serialized` raises it.
    """

    error: BaseException | None = None

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of `steps` steps begins, inside `parent`."""

    def step_complete(self, phase: str, step: int) -> bool:
        """Step `step`, counted from 0, is done; return False to stop the build."""
        return True

    def phase_finish(self, phase: str) -> None:
        """The phase ended, also when the build was stopped in it."""


@dataclass(frozen=True)
class ParseFailure:
    """One error of the ONNX parser. `node` is the node's name, or its index where it has none; `code` is by name."""

    code: str
    node: str
    operator: str
    why: str

    def as_text(self) -> str:
        """One line."""
        return f"{self.operator or 'graph'} {self.node!r}: {self.why} ({self.code})"


class BuildApi(BaseApi):
    """ONNX to plan. Objects of TensorRT go in and out; they live as long as the adapter."""

    def create_builder(self, *, max_threads: int | None = None) -> trt.Builder:
        """A builder; needs a CUDA device. EngineError where there is none."""
        self.log.errors.clear()
        fix = "a build needs a CUDA device and its driver; see `bridgeport doctor`"
        try:
            builder: trt.Builder = self.trt.Builder(self.logger)
        except TypeError as error:  # pybind11: "factory function returned nullptr"
            raise self._failed("TensorRT made no builder", fix) from error
        if max_threads is not None:
            builder.max_threads = max_threads
        return builder

    def create_strongly_typed_network(self, builder: trt.Builder) -> trt.INetworkDefinition:
        """An empty network whose types are those of the graph. On 11 every network is; the flag is taken there too."""
        self.log.errors.clear()
        flags = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network: trt.INetworkDefinition = builder.create_network(flags)
        self._check(network, "TensorRT made no network")
        return network

    def create_config(self, builder: trt.Builder) -> trt.IBuilderConfig:
        """A config with TensorRT's defaults; TF32 is on in it, state it with `set_tf32`."""
        config: trt.IBuilderConfig = builder.create_builder_config()
        self._check(config, "TensorRT made no builder config")
        return config

    # Parsing

    def create_parser(
        self, network: trt.INetworkDefinition, config: trt.IBuilderConfig | None = None
    ) -> trt.OnnxParser:
        """A parser that fills `network`; from 10.15 it may look at `config`."""
        parser: trt.OnnxParser = self.trt.OnnxParser(network, self.logger)
        if config is not None and self.has("parser_set_builder_config"):
            self._check(parser.set_builder_config(config), "the ONNX parser refused the builder config")
        return parser

    def parse_onnx(self, parser: trt.OnnxParser, path: Path) -> None:
        """Fill the network from a file and its external data. EngineError names the first node that is refused."""
        self.log.errors.clear()
        self._check_parsed(parser, bool(parser.parse_from_file(str(path))), path.name)

    def parse_onnx_bytes(self, parser: trt.OnnxParser, model: bytes, path: Path | None = None) -> None:
        """As `parse_onnx`, of a serialised model; its external data is looked up beside `path`."""
        self.log.errors.clear()
        done = parser.parse(model) if path is None else parser.parse(model, str(path))
        self._check_parsed(parser, bool(done), path.name if path is not None else "the model")

    def _check_parsed(self, parser: trt.OnnxParser, done: bool, name: str) -> None:
        if done:
            return
        failures = self.parse_failures(parser)
        more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
        why = failures[0].as_text() + more if failures else "the parser gave no reason"
        raise self._failed_because(f"{name} is not taken by TensorRT {self.version}", why)

    def parse_failures(self, parser: trt.OnnxParser) -> list[ParseFailure]:
        """What the parser refused, in its order."""
        failures = []
        for index in range(parser.num_errors):
            error: trt.ParserError = parser.get_error(index)
            code: trt.ErrorCode = error.code()
            node = error.node_name() or str(error.node())
            failures.append(ParseFailure(code.name, node, error.node_operator(), error.desc()))
        return failures

    def unsupported_nodes(self, parser: trt.OnnxParser, path: Path) -> list[int]:
        """Indices of the nodes that the parser has no importer for; none if it takes the whole graph."""
        if parser.supports_model_v2(path.read_bytes(), str(path)):
            return []
        indices: list[int] = []
        for subgraph in range(parser.num_subgraphs):
            if not parser.is_subgraph_supported(subgraph):
                nodes: list[int] = parser.get_subgraph_nodes(subgraph)
                indices.extend(nodes)
        return sorted(indices)

    def network_tensors(self, network: trt.INetworkDefinition) -> list[TensorInfo]:
        """Inputs, then outputs."""
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        return [_tensor(tensor, "input") for tensor in inputs] + [_tensor(tensor, "output") for tensor in outputs]

    # Config

    def set_flags(self, config: trt.IBuilderConfig, names: Iterable[str]) -> None:
        """Set flags of `versions.BUILDER_FLAGS` by name; InputError for one that this version lacks."""
        for flag in [self._builder_flag(name) for name in names]:
            config.set_flag(flag)

    def set_tf32(self, config: trt.IBuilderConfig, enabled: bool) -> None:
        """Whether FP32 products may be rounded to TF32. TensorRT's own default is on, Polygraphy's is off."""
        if enabled:
            config.set_flag(self.trt.BuilderFlag.TF32)
        else:
            config.clear_flag(self.trt.BuilderFlag.TF32)

    def flag_names(self, config: trt.IBuilderConfig) -> list[str]:
        """Names of the flags that are set, sorted: what a manifest or a cache key holds, never their integers."""
        # Not all members: WEIGHTLESS of 10.x is a second name of STRIP_PLAN.
        known = [name for name, needs in BUILDER_FLAGS.items() if needs is None or self.has(needs)]
        return sorted(name for name in known if config.get_flag(self._builder_flag(name)))

    def set_memory_limits(self, config: trt.IBuilderConfig, limits: Mapping[str, int]) -> None:
        """Memory pool (WORKSPACE, TACTIC_DRAM, TACTIC_SHARED_MEMORY) -> bytes; the others keep their default."""
        for name, size in limits.items():
            check_member(self.version, "MemoryPoolType", name)
            pool: trt.MemoryPoolType = getattr(self.trt.MemoryPoolType, name)
            config.set_memory_pool_limit(pool, size)

    def memory_limit(self, config: trt.IBuilderConfig, name: str) -> int:
        """Bytes that a memory pool may take."""
        check_member(self.version, "MemoryPoolType", name)
        pool: trt.MemoryPoolType = getattr(self.trt.MemoryPoolType, name)
        return int(config.get_memory_pool_limit(pool))

    def set_effort(
        self,
        config: trt.IBuilderConfig,
        *,
        optimization_level: int | None = None,
        avg_timing_iterations: int | None = None,
        max_aux_streams: int | None = None,
    ) -> None:
        """How long the builder searches (level 0 to 5, default 3; timings averaged) and on how many streams."""
        if optimization_level is not None:
            config.builder_optimization_level = optimization_level
        if avg_timing_iterations is not None:
            config.avg_timing_iterations = avg_timing_iterations
        if max_aux_streams is not None:
            config.max_aux_streams = max_aux_streams

    def set_hardware_compatibility(self, config: trt.IBuilderConfig, name: str) -> None:
        """NONE, AMPERE_PLUS or, from 10.9, SAME_COMPUTE_CAPABILITY."""
        check_member(self.version, "HardwareCompatibilityLevel", name)
        level: trt.HardwareCompatibilityLevel = getattr(self.trt.HardwareCompatibilityLevel, name)
        config.hardware_compatibility_level = level

    def set_profiling_verbosity(self, config: trt.IBuilderConfig, name: str) -> None:
        """NONE, LAYER_NAMES_ONLY or DETAILED: what the engine inspector can tell later."""
        check_member(self.version, "ProfilingVerbosity", name)
        verbosity: trt.ProfilingVerbosity = getattr(self.trt.ProfilingVerbosity, name)
        config.profiling_verbosity = verbosity

    def set_runtime_platform(self, config: trt.IBuilderConfig, name: str) -> None:
        """SAME_AS_BUILD or WINDOWS_AMD64; there is no cross build for a Jetson."""
        check_member(self.version, "RuntimePlatform", name)
        platform: trt.RuntimePlatform = getattr(self.trt.RuntimePlatform, name)
        config.runtime_platform = platform

    def set_preview_feature(self, config: trt.IBuilderConfig, name: str, enabled: bool) -> None:
        """Switch a preview feature of `versions.PREVIEW_FEATURES`."""
        check_member(self.version, "PreviewFeature", name)
        feature: trt.PreviewFeature = getattr(self.trt.PreviewFeature, name)
        config.set_preview_feature(feature, enabled)

    def add_profile(
        self, builder: trt.Builder, config: trt.IBuilderConfig, shapes: Mapping[str, tuple[Shape, Shape, Shape]]
    ) -> int:
        """Add an optimization profile, input -> (min, opt, max) shape, and return its index, counted from 0."""
        self.log.errors.clear()
        profile: trt.IOptimizationProfile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            try:
                profile.set_shape(name, low, best, high)
            except (RuntimeError, ValueError) as error:  # the first is raised, the second documented
                detail = f"min {list(low)}, opt {list(best)}, max {list(high)}"
                why = f"{detail}: {error}"
                raise self._failed_because(f"profile of {name}", why, "min <= opt <= max on each axis") from error
        index = int(config.add_optimization_profile(profile))
        self._check(index >= 0, "the optimization profile is not valid", "min <= opt <= max on each axis")
        return index

    # Timing cache

    def load_timing_cache(self, config: trt.IBuilderConfig, data: bytes = b"") -> trt.ITimingCache:
        """Use a timing cache, `b""` for a new one. EngineError for one of another device, version or file."""
        self.log.errors.clear()
        cache: trt.ITimingCache = config.create_timing_cache(data)
        fix = "it belongs to another device or TensorRT version, or is damaged; remove it"
        self._check(cache, "the timing cache cannot be read", fix)
        self._check(config.set_timing_cache(cache, False), "the timing cache is refused", fix)
        return cache

    def timing_cache_bytes(self, config: trt.IBuilderConfig) -> bytes:
        """The config's timing cache with what the build added."""
        cache: trt.ITimingCache = config.get_timing_cache()
        self._check(cache, "the builder config has no timing cache")
        return bytes(memoryview(cache.serialize()))

    def combine_timing_caches(self, config: trt.IBuilderConfig, parts: Iterable[bytes]) -> bytes:
        """One cache from several of the same device and version; a part of another one raises EngineError."""
        self.log.errors.clear()
        whole: trt.ITimingCache = config.create_timing_cache(b"")
        for data in parts:
            part: trt.ITimingCache = config.create_timing_cache(data)
            done = part is not None and whole.combine(part, False)
            self._check(done, "a timing cache cannot be merged", "it belongs to another device or version; remove it")
        return bytes(memoryview(whole.serialize()))

    # Build

    def set_progress(self, config: trt.IBuilderConfig, progress: BuildProgress) -> trt.IProgressMonitor:
        """Report the build's phases to `progress`. Keep what is returned until the build has ended."""
        monitor: trt.IProgressMonitor = self._create_monitor(progress)
        config.progress_monitor = monitor
        return monitor

    def build_serialized(
        self,
        builder: trt.Builder,
        network: trt.INetworkDefinition,
        config: trt.IBuilderConfig,
        progress: BuildProgress | None = None,
    ) -> bytes:
        """The plan. EngineError with TensorRT's first error; what a callback of `progress` raised is raised again."""
        self.log.errors.clear()
        monitor = self.set_progress(config, progress) if progress is not None else None
        plan = builder.build_serialized_network(network, config)
        del monitor  # lived as long as the build
        if progress is not None and progress.error is not None:
            raise progress.error
        self._check(plan, "the engine was not built", "see the build log")
        return bytes(memoryview(plan))

    def _create_monitor(self, progress: BuildProgress) -> trt.IProgressMonitor:
        module = self.trt

        class Monitor(module.IProgressMonitor):  # type: ignore[misc, name-defined]
            """An exception must not cross the library's C++ frames: it is kept, and the build stops."""

            def __init__(self) -> None:
                module.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                try:
                    progress.phase_start(phase_name, parent_phase or None, num_steps)
                except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt too
                    progress.error = progress.error or error

            def step_complete(self, phase_name: str, step: int) -> bool:
                try:
                    return progress.step_complete(phase_name, step) and progress.error is None
                except BaseException as error:  # noqa: BLE001
                    progress.error = progress.error or error
                    return False

            def phase_finish(self, phase_name: str) -> None:
                try:
                    progress.phase_finish(phase_name)
                except BaseException as error:  # noqa: BLE001
                    progress.error = progress.error or error

        return Monitor()


def _tensor(tensor: trt.ITensor, mode: str) -> TensorInfo:
    dtype: trt.DataType = tensor.dtype
    location: trt.TensorLocation = tensor.location
    return TensorInfo(tensor.name, mode, dtype_name(dtype), tuple(tensor.shape), location.name.lower())
