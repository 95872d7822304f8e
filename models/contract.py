"""What each stage takes and gives, as data: export, TensorRT profiles, run time and tests read this one object.

Torch-free and Python 3.10-clean, because a board that only runs bundles imports it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]


class Record(BaseModel):
    """A frozen record that refuses unknown keys: the base of everything that is written to `manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)


class WholePatches(Record):
    """How many whole squares of `size` pixels lie in a picture whose edges are the axes `edges`."""

    edges: tuple[str, str]
    size: int = Field(ge=1)


class Axis(Record):
    """A dynamic axis. `min`, `opt` and `max` become the bounds of a TensorRT optimization profile.

    `patches`: for an axis that an output has and no input, how its size follows from those of others.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    min: int = Field(ge=0)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)
    patches: WholePatches | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Axis:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"axis {self.name}: need min <= opt <= max, got {self.min}, {self.opt}, {self.max}")
        return self


class TensorSpec(Record):
    """One input or output. A `str` in `shape` names an axis of the stage, an `int` is a static size."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


class StageContract(Record):
    """Inputs, outputs and dynamic axes of one stage.

    An axis that stands in several tensors has one size in one call. Every named axis must be declared in `axes`.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: tuple[Axis, ...]

    @model_validator(mode="after")
    def _axes_are_declared(self) -> StageContract:
        declared = {axis.name for axis in self.axes}
        used = {dim for spec in (*self.inputs, *self.outputs) for dim in spec.shape if isinstance(dim, str)}
        if used != declared:
            raise ValueError(f"stage {self.name}: axes used {sorted(used)} but declared {sorted(declared)}")
        return self

    def axis(self, name: str) -> Axis:
        """The axis called `name`; KeyError when there is none."""
        return {axis.name: axis for axis in self.axes}[name]

    def input(self, name: str) -> TensorSpec:
        """The input called `name`; KeyError when there is none."""
        return {spec.name: spec for spec in self.inputs}[name]

    def bind_axes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Sizes of the dynamic axes, read off the shapes of the inputs that came.

        Raises ValueError naming the input, what came and what is accepted when a rank, a static size, a shared axis
        or an axis' range does not hold.
        """
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name not in shapes:
                raise ValueError(f"{self.name}: input {spec.name!r} is missing; it takes {list(spec.shape)}")
            shape = shapes[spec.name]
            if len(shape) != len(spec.shape):
                raise ValueError(f"{self.name}: {spec.name} is {list(shape)}, accepted is {list(spec.shape)}")
            for size, dim in zip(shape, spec.shape, strict=True):
                self._bind_one(spec, shape, size, dim, sizes)
        for axis in self.axes:
            if axis.patches is not None and axis.name not in sizes:
                height, width = (sizes[edge] // axis.patches.size for edge in axis.patches.edges)
                sizes[axis.name] = height * width
        return sizes

    def _bind_one(
        self, spec: TensorSpec, shape: tuple[int, ...], size: int, dim: int | str, sizes: dict[str, int]
    ) -> None:
        if isinstance(dim, int):
            if size != dim:
                raise ValueError(f"{self.name}: {spec.name} is {list(shape)}, accepted is {list(spec.shape)}")
            return
        axis = self.axis(dim)
        if not axis.min <= size <= axis.max:
            raise ValueError(
                f"{self.name}: axis {dim!r} of {spec.name} is {size}, accepted is {axis.min} to {axis.max}"
            )
        if sizes.setdefault(dim, size) != size:
            raise ValueError(f"{self.name}: axis {dim!r} is {size} in {spec.name} but {sizes[dim]} before it")


class KvCacheContract(Record):
    """The decoder's key/value cache: per layer two tensors `[batch, num_heads, length, head_size]`.

    With `shared_buffer` past and present are one buffer of the full length, written in place (ONNX Runtime's
    GroupQueryAttention); the run time allocates it once and binds it to both names.
    """

    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    head_size: int = Field(ge=1)
    dtype: DType
    shared_buffer: bool
    past: str = "past_key_values.{layer}.{kind}"
    present: str = "present.{layer}.{kind}"
