"""An execution context with what is set in it: profile, input shapes, addresses; only what changed is set again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import EngineError
from .api import Api
from .device import Block, Device
from .graphs import GraphRun

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """An optimization profile: input -> (min, opt, max) shape."""

    name: str
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]

    def refusal(self, shapes: Mapping[str, Shape], axes: Mapping[str, Sequence[int | str]]) -> str | None:
        """None when all shapes lie inside, else which axis does not and its range; `axes` names those of inputs."""
        for name, shape in shapes.items():
            low, _, high = self.shapes[name]
            if len(shape) != len(low):
                return f"{name} is {list(shape)}, it has {len(low)} axes"
            for at, size in enumerate(shape):
                if not low[at] <= size <= high[at]:
                    called = axes[name][at] if name in axes else at
                    axis = f"axis {called!r}" if isinstance(called, str) else f"axis {at}"
                    return f"{axis} of {name} is {size}, profile {self.name!r} takes {low[at]} to {high[at]}"
        return None


@dataclass
class Output:
    """Memory of an output whose size depends on data, and the shape that it came to."""

    device: Device
    block: Block | None = None
    shape: Shape = ()

    def allocate(self, name: str, address: int, size: int, alignment: int, stream: int) -> int:
        """What TensorRT asks for while it enqueues; 0 when the device's memory is used up."""
        if self.block is None or self.block.size < size:
            try:
                self.block = self.device.block(size)
            except EngineError:
                return 0
        return self.block.address

    def notify_shape(self, name: str, shape: Shape) -> None:
        """TensorRT tells the shape."""
        self.shape = shape


@dataclass
class _State:
    """What the context was told last."""

    profile: int = -1
    shapes: dict[str, Shape] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, Shape] | None = None  # those that were expected when the engine's were looked at


class Context:
    """Runs an engine on the device's stream, in NVIDIA's order: profile, input shapes, addresses, enqueue.

    `axes`: input -> the contract's names of its axes, for messages. `graphs`: whether runs may become CUDA graphs.
    """

    def __init__(
        self,
        api: Api,
        engine: Any,
        device: Device,
        *,
        stage: str,
        axes: Mapping[str, Sequence[int | str]],
        profile_names: Sequence[str] = (),
        graphs: bool = True,
    ) -> None:
        self.tensors = {info.name: info for info in api.tensors(engine)}
        self._api, self._engine, self._device = api, engine, device
        self._stage, self._axes = stage, axes
        self._profiles = self._read_profiles(profile_names)
        # Its activations lie in the block that all stages of the bundle share: they never run at the same time.
        self._context = api.create_context(engine, "USER_MANAGED")
        size = api.device_memory_size(engine)
        self._activations = device.share_activations(size)
        api.set_device_memory(self._context, self._activations.address, self._activations.size)
        self._state = _State()
        self._dynamic: dict[str, Output] = {}
        self._kept: list[Any] = []  # TensorRT holds no reference to an allocator
        streams = api.streamable_weights_size(engine) > 0
        self.graph = GraphRun(device.cuda, device.stream, stage, wanted=graphs and not streams)

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return [name for name, info in self.tensors.items() if info.mode == "input"]

    def prepare(self, tensors: Mapping[str, tuple[Shape, int]]) -> None:
        """Set what the next run needs: `tensors` has the shape and address of every input and output.

        An address is on the device, or on the host for a tensor that is there. EngineError for a shape outside of every
        profile, for outputs that come to another shape than the one expected, and for what TensorRT refuses.
        """
        shapes = {name: tensors[name][0] for name in self.inputs}
        self._choose_profile(shapes)
        self._set_shapes(shapes)
        self._set_addresses({name: address for name, (_, address) in tensors.items()})
        outputs = {name: shape for name, (shape, _) in tensors.items() if name not in shapes}
        if self._state.outputs != outputs or self._host_inputs():  # whose values may change the outputs' shapes
            self._check_outputs(outputs)
            self._state.outputs = outputs

    def enqueue(self) -> None:
        """Put the run on the stream, as it was prepared."""
        self.graph.run(self._execute, capturable=not self._dynamic and not self._host_inputs())

    def dynamic_output(self, name: str) -> Output | None:
        """Where an output is whose size depends on data, once the stream has come so far; None for any other."""
        return self._dynamic.get(name)

    def close(self) -> None:
        """Free the context and the engine."""
        self.graph.drop()
        self._context = self._engine = None
        self._dynamic.clear()
        self._kept.clear()

    def _execute(self) -> None:
        self._api.execute(self._context, self._device.stream)

    def _choose_profile(self, shapes: Mapping[str, Shape]) -> None:
        """The one that is set, if it takes these shapes, else the first that does."""
        current = self._state.profile
        order = [*([current] if current >= 0 else []), *(i for i in range(len(self._profiles)) if i != current)]
        reasons = []
        for index in order:
            reason = self._profiles[index].refusal(shapes, self._axes)
            if reason is None:
                break
            reasons.append((index, reason))
        else:
            told = "; ".join(reason for _, reason in sorted(reasons))
            raise EngineError(f"{self._stage}: {told}; stay inside, or build with --profile MIN,OPT,MAX of that axis")
        if index != current:
            self.graph.drop()
            self._api.set_profile(self._context, index, self._device.stream)
            self._state = _State(index)

    def _set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        for name, shape in shapes.items():
            if -1 in self.tensors[name].shape and self._state.shapes.get(name) != shape:
                self.graph.drop()
                self._state.outputs = None
                self._api.set_input_shape(self._context, name, shape)
                self._state.shapes[name] = shape

    def _set_addresses(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if self._state.addresses.get(name) != address:
                self.graph.drop()
                self._api.set_address(self._context, name, address)
                self._state.addresses[name] = address

    def _check_outputs(self, expected: Mapping[str, Shape]) -> None:
        """What the engine will write is what there is room for; an output of unknown size gets an allocator."""
        if lacking := self._api.infer_shapes(self._context):
            raise EngineError(f"{self._stage}: no shape is known for {', '.join(lacking)}; build the bundle again")
        for name, shape in expected.items():
            found = self._api.tensor_shape(self._context, name)
            if -1 in found:
                self._allocate_dynamic(name)
            elif found != shape:
                raise EngineError(
                    f"{self._stage}: {name} comes to {list(found)} in the engine and to {list(shape)} in the manifest; "
                    "build the bundle again"
                )

    def _allocate_dynamic(self, name: str) -> None:
        if name not in self._dynamic:
            self._dynamic[name] = Output(self._device)
            self._kept.append(self._api.set_output_memory(self._context, name, self._dynamic[name]))

    def _host_inputs(self) -> bool:
        """Values of shape tensors are read at the enqueue, so a graph would keep old ones."""
        return any(info.mode == "input" and info.location == "host" for info in self.tensors.values())

    def _read_profiles(self, names: Sequence[str]) -> list[Profile]:
        count = self._api.num_profiles(self._engine)
        called = list(names) if len(names) == count else [str(index) for index in range(count)]
        return [Profile(called[at], {name: self._range_of(name, at) for name in self.inputs}) for at in range(count)]

    def _range_of(self, name: str, profile: int) -> tuple[Shape, Shape, Shape]:
        fixed = self.tensors[name].shape
        return self._api.profile_shapes(self._engine, name, profile) if -1 in fixed else (fixed, fixed, fixed)
