"""`--device`: whether this machine is the one that is named, and how much memory a build may take there.

The devices themselves are those of preflight (`export/preflight/data/devices.json`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...engine_record import BuildOptions, MachineRecord
from ...errors import InputError, UnsupportedError
from ...manifest import Manifest
from ..preflight import devices as table
from ..preflight.devices import GIB, Device, devices, tables

if TYPE_CHECKING:
    from ..preflight.memory import BuildSettings  # needs onnx, which a board has not

LOCAL = "local"
# TensorRT's own default, which is stated where neither the command line nor the device says another.
LEVEL = 3
# A device shows less memory than it is sold with (an 8 GB board about 7.4), never this much less or any more.
_LEAST_SHOWN, _MOST_SHOWN = 0.75, 1.02


def find_device(name: str) -> Device | None:
    """The device called `name`, None for "local". InputError for an unknown one."""
    if name == LOCAL:
        return None
    if name not in devices():
        raise InputError(f"--device {name!r} is unknown; accepted are {LOCAL}, {', '.join(devices())}")
    return devices()[name]


def check_device(name: str, machine: MachineRecord) -> None:
    """UnsupportedError unless this machine is of the kind that `name` names: an engine is built where it will run."""
    device = find_device(name)
    if device is None or _is(device, machine):
        return
    raise UnsupportedError(
        f"--device {name} is {device.title} (SM {device.compute_capability}, {device.memory_gib:g} GB), here is "
        f"{machine.gpu} (SM {machine.compute_capability}, {machine.memory / GIB:.1f} GB); engines are built on the "
        f"device that runs them: `bridgeport pack BUNDLE -o FILE.tar.gz --device {name}` makes an archive that does so"
    )


def check_precisions(manifest: Manifest, name: str) -> None:
    """UnsupportedError for a stage in a precision that the named device has no kernels for."""
    device = find_device(name)
    if device is None:
        return
    stages = [(stage.contract.name, stage.precision) for stage in manifest.stages]
    for one in table.check_precisions(device, stages):
        if one.severity == "error":
            raise UnsupportedError(f"--device {name}, stage {one.stage}: {one.why}; {one.fix}")


def device_of(name: str, machine: MachineRecord | None) -> Device | None:
    """The named device; for "local" the Jetson that this machine is, None for any other machine."""
    device = find_device(name)
    if device is None and machine is not None:
        return next((one for one in devices().values() if one.jetson and _is(one, machine)), None)
    return device


def with_device_limits(options: BuildOptions, name: str, machine: MachineRecord | None = None) -> BuildOptions:
    """`options` with the device's limits where none were given, and a level that is stated.

    For "local" on a Jetson those of the board with this machine's memory.
    """
    device = device_of(name, machine)
    limits: dict[str, int | None] = {"optimization_level": LEVEL}
    if device is not None:
        limits["optimization_level"] = device.builder_optimization_level or LEVEL
        limits |= {"workspace_mib": device.workspace_mib, "tactic_dram_mib": device.tactic_dram_mib}
    return options.model_copy(update={key: value for key, value in limits.items() if getattr(options, key) is None})


def with_recommended(options: BuildOptions, settings: BuildSettings | None) -> BuildOptions:
    """`options` with what preflight found for this bundle on a small board, where nothing was given: the weights may
    leave less than the device's limits.
    """
    if settings is None:
        return options
    limits = {
        "workspace_mib": settings.workspace_mib,
        "tactic_dram_mib": settings.tactic_dram_mib,
        "optimization_level": settings.builder_optimization_level,
    }
    return options.model_copy(update={key: value for key, value in limits.items() if getattr(options, key) is None})


def describe_device(name: str) -> str:
    """The device with its software, for a script's head."""
    device = find_device(name)
    if device is None:
        return "the machine that it runs on"
    if not device.jetson:
        return device.title
    rows = [row for row in tables()["jetpacks"] if device.family in row["families"]]
    software = ", ".join(f"JetPack {row['jetpack']}" for row in rows)
    return f"{device.title} ({software})"


def _is(device: Device, machine: MachineRecord) -> bool:
    shown = machine.memory / GIB / device.memory_gib
    return (
        device.compute_capability == machine.compute_capability
        and device.jetson == (machine.l4t is not None)
        and _LEAST_SHOWN <= shown <= _MOST_SHOWN
    )
