"""What a TensorRT engine was built from, with and for: the part of the manifest that decides whether it may be loaded.

A plan is executable code for one version of TensorRT on one kind of GPU. `check_engine` compares the record with the
machine before a byte of the plan is deserialised, and names the command that builds it anew.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from .models.contract import Record

# (min, opt, max) of an axis, and of a whole shape.
AxisRange = tuple[int, int, int]
ShapeRange = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
HardwareCompatibility = Literal["NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"]


class MachineRecord(Record):
    """A GPU and the software around it.

    `tensorrt`: the Python module's version. `cuda`: the newest CUDA that the driver serves. `driver`: the driver's own
    version, None where it is not told. `memory`: bytes of the device, which on a Jetson the host shares. `l4t` and
    `jetpack`: None on anything but a Jetson.
    """

    platform: str
    gpu: str
    compute_capability: str = Field(pattern=r"^\d+\.\d+$")
    memory: int = Field(ge=0)
    tensorrt: str
    cuda: str
    driver: str | None = None
    l4t: str | None = None
    jetpack: str | None = None


class BuildOptions(Record):
    """How engines are built.

    `optimization_level`: 0 to 5, how long the builder searches; None for the device's (3, less on small boards).
    `workspace_mib`, `tactic_dram_mib`: memory pools, None for the device's or TensorRT's own limit (all of the device;
    75 % of a Jetson's memory for tactics). `tf32`: whether products of FP32 may be rounded to TF32; off, since what is
    FP32 in a graph was left so for its accuracy (TensorRT's default is on, Polygraphy's off).
    `hardware_compatibility`: a member of tensorrt.HardwareCompatibilityLevel. `strip`: plans without weights, which
    are refitted from the ONNX file at load. `weight_streaming`: weights may stay on the host.
    """

    optimization_level: int | None = Field(default=None, ge=0, le=5)
    workspace_mib: int | None = Field(default=None, ge=1)
    tactic_dram_mib: int | None = Field(default=None, ge=1)
    tf32: bool = False
    hardware_compatibility: HardwareCompatibility = "NONE"
    version_compatible: bool = False
    strip: bool = False
    weight_streaming: bool = False

    def flags(self) -> tuple[str, ...]:
        """Members of tensorrt.BuilderFlag to set, by name; TF32 apart, whose default is on."""
        chosen = {
            "STRIP_PLAN": self.strip,
            "REFIT_IDENTICAL": self.strip,  # the weights will be those of the build: no speed is given up
            "VERSION_COMPATIBLE": self.version_compatible,
            "WEIGHT_STREAMING": self.weight_streaming,
        }
        return tuple(name for name, wanted in chosen.items() if wanted)

    def arguments(self) -> list[str]:
        """The options of `bridgeport build` that differ from the defaults."""
        words: list[str] = []
        for name, value in self.model_dump(exclude_defaults=True).items():
            option = _OPTION_NAMES[name]
            words += [option] if value is True else [option, str(value)]
        return words


_OPTION_NAMES = {
    "optimization_level": "--optimization-level",
    "workspace_mib": "--workspace",
    "tactic_dram_mib": "--tactic-dram",
    "tf32": "--tf32",
    "hardware_compatibility": "--hardware-compatibility",
    "version_compatible": "--version-compatible",
    "strip": "--strip",
    "weight_streaming": "--weight-streaming",
}


class EngineProfile(Record):
    """One optimization profile, in the engine's order.

    `name`: "default", or "prefill" and "decode" of a language model whose cache grows. `axes`: the contract's axes and
    `past_sequence`, the length of such a cache. `shapes`: every input, those of the cache too, to its shapes.
    """

    name: str
    axes: dict[str, AxisRange]
    shapes: dict[str, ShapeRange]

    @field_validator("axes")
    @classmethod
    def _ordered(cls, axes: dict[str, AxisRange]) -> dict[str, AxisRange]:
        for axis, (low, best, high) in axes.items():
            if not 0 <= low <= best <= high:
                raise ValueError(f"axis {axis}: need 0 <= min <= opt <= max, got {low}, {best}, {high}")
        return axes

    def holds(self, shapes: dict[str, tuple[int, ...]]) -> str | None:
        """None when shapes of inputs lie inside the profile, else the first axis that does not, and its range."""
        for name, shape in shapes.items():
            low, _, high = self.shapes[name]
            if len(shape) != len(low):
                return f"{name} is {list(shape)}, the profile has {len(low)} axes"
            for at, size in enumerate(shape):
                if not low[at] <= size <= high[at]:
                    return f"axis {at} of {name} is {size}, the profile {self.name!r} takes {low[at]} to {high[at]}"
        return None


class EngineRecord(Record):
    """A stage's engine.

    `file`: the plan, a path in the bundle. `sources`: bundle path -> SHA-256 of the ONNX graph and its external data.
    `flags`: members of tensorrt.BuilderFlag that were set, by name: their integers differ between versions.
    `requested`: the words of the command line that chose profiles and options, for the command that rebuilds it.
    """

    file: str
    machine: MachineRecord
    profiles: tuple[EngineProfile, ...] = Field(min_length=1)
    precision: str
    sources: dict[str, str]
    flags: tuple[str, ...]
    options: BuildOptions
    requested: tuple[str, ...] = ()
    bridgeport_version: str

    def rebuild_command(self, bundle: str = "BUNDLE") -> str:
        """The command line that builds the bundle `bundle` anew, for the machine that it runs on."""
        return shlex.join(["bridgeport", "build", bundle, "-o", "NEW", *self.requested])


@dataclass(frozen=True)
class EngineMismatch:
    """Why an engine may not be loaded here: which fact, as it was built, as it is, and how to build it here."""

    what: str
    built: str
    found: str
    why: str
    rebuild: str

    def as_text(self) -> str:
        """One line."""
        return f"{self.what} is {self.found}, the engine was built for {self.built} ({self.why}); {self.rebuild}"


def check_engine(record: EngineRecord, machine: MachineRecord, bundle: str = "BUNDLE") -> list[EngineMismatch]:
    """Everything in which `machine` differs from what the engine needs; empty when it may be loaded.

    A version-compatible engine takes a newer TensorRT, one with hardware compatibility another GPU. Driver, CUDA and
    L4T may be newer, for NVIDIA keeps drivers able to run older binaries, but never older.
    """
    built, rebuild = record.machine, f"rebuild it here: {record.rebuild_command(bundle)}"
    found: list[tuple[str, str | None, str | None, str]] = []
    if built.platform != machine.platform:
        found.append(("platform", built.platform, machine.platform, "a plan runs on the platform of its build"))
    if (why := _other_tensorrt(record, machine)) is not None:
        found.append(("TensorRT", built.tensorrt, machine.tensorrt, why))
    if (why := _other_gpu(record, machine)) is not None:
        built_gpu = f"{built.gpu} (SM {built.compute_capability})"
        found.append(("GPU", built_gpu, f"{machine.gpu} (SM {machine.compute_capability})", why))
    if (built.l4t is None) != (machine.l4t is None):
        found.append(("Jetson Linux", built.l4t or "none", machine.l4t or "none", "one is a Jetson, the other is not"))
    for what, before, now in (
        ("CUDA", built.cuda, machine.cuda),
        ("driver", built.driver, machine.driver),
        ("Jetson Linux", built.l4t, machine.l4t),
    ):
        if before is not None and now is not None and _numbers(now) < _numbers(before):
            found.append((what, before, now, "older than at the build"))
    return [EngineMismatch(what, str(was), str(now), why, rebuild) for what, was, now, why in found]


def _other_tensorrt(record: EngineRecord, machine: MachineRecord) -> str | None:
    was, now = _numbers(record.machine.tensorrt), _numbers(machine.tensorrt)
    if was == now:
        return None
    if not record.options.version_compatible:
        return "a plan runs on exactly its version, unless it is built with --version-compatible"
    return None if now > was else "a version-compatible plan runs on its version and newer ones"


def _other_gpu(record: EngineRecord, machine: MachineRecord) -> str | None:
    built, level = record.machine, record.options.hardware_compatibility
    if level == "AMPERE_PLUS":
        return None if _numbers(machine.compute_capability) >= (8, 0) else "AMPERE_PLUS needs SM 8.0 or newer"
    if built.compute_capability != machine.compute_capability:
        return "a plan runs on the SM of its build"
    if level == "NONE" and built.gpu != machine.gpu:
        return "kernels were chosen on another model; --hardware-compatibility SAME_COMPUTE_CAPABILITY lifts this"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """ "580.65.06" -> (580, 65, 6); what follows the numbers is left out."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
