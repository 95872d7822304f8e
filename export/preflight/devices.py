"""The devices that preflight knows, and whether one can run a TensorRT version and a precision at all.

`data/devices.json` has memory, compute capability, DLA cores and the JetPack releases, with the source of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...runtime.tensorrt.versions import Version
from .findings import Finding

_FILE = Path(__file__).parent / "data" / "devices.json"
GIB, MIB = 1 << 30, 1 << 20
BUNDLE = "bundle"


@dataclass(frozen=True)
class Device:
    """A GPU or a board.

    `memory_gib`: as sold; `unified`: shared with the host. `reserved_mib`: what system and CUDA take of it, an
    assumption. `workspace_mib`, `tactic_dram_mib`, `builder_optimization_level`: upper bounds for builds there, None
    where TensorRT's defaults do.
    """

    name: str
    title: str
    family: str
    compute_capability: str
    memory_gib: float
    unified: bool
    reserved_mib: int
    dla_cores: int
    source: str
    workspace_mib: int | None = None
    tactic_dram_mib: int | None = None
    builder_optimization_level: int | None = None

    @property
    def jetson(self) -> bool:
        """Whether it is a board with JetPack."""
        return self.family != "discrete"

    @property
    def usable_bytes(self) -> int:
        """Memory that engines and builds can take."""
        return int(self.memory_gib * GIB) - self.reserved_mib * MIB

    @property
    def sm(self) -> tuple[int, int]:
        """Compute capability as numbers."""
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)


@cache
def tables() -> dict[str, Any]:
    """`devices.json`."""
    document: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return document


@cache
def devices() -> dict[str, Device]:
    """Every known device by its name."""
    return {row["name"]: Device(**row) for row in tables()["devices"]}


def find_device(name: str) -> Device:
    """The device called `name`; InputError that lists the known ones for any other."""
    if name not in devices():
        raise InputError(f"device {name!r} is unknown; accepted are {', '.join(devices())}")
    return devices()[name]


def supports(device: Device, precision: str) -> bool:
    """Whether the device's tensor cores have a precision; what the table does not name is taken for granted."""
    row = tables()["precisions"].get(precision)
    return row is None or device.sm >= tuple(int(part) for part in row["first"].split("."))


def check_precisions(device: Device, precisions: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    """Findings for (stage, precision) pairs that the device lacks, or has without anyone having verified it."""
    known = tables()["precisions"]
    for stage, precision in precisions:
        if precision not in known:
            continue
        have = ", ".join(one for one in known if supports(device, one))
        if not supports(device, precision):
            why = (
                f"{precision.upper()} needs compute capability {known[precision]['first']}, {device.title} has "
                f"{device.compute_capability} ({have})"
            )
            yield Finding("device-precision", "error", stage, device.name, why, f"quantise to one of {have}")
        elif device.compute_capability in known[precision].get("unverified", ()):
            why = f"{precision.upper()} on {device.title}: no source says so (unverified)"
            yield Finding("device-precision", "warning", stage, device.name, why, "measure it against FP16")


def check_reports(device: Device, version: Version, precisions: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    """Warnings for (stage, precision) pairs of which somebody reports wrong numbers there."""
    for row in tables()["reports"]:
        of = Version.parse(row["tensorrt"])
        if device.family not in row["families"] or (version.major, version.minor) != (of.major, of.minor):
            continue
        for stage, precision in precisions:
            if stage in row["stages"] and precision == row["precision"]:
                why = f"TensorRT {version} on {device.title}: {row['why']} (unverified: {row['source']})"
                yield Finding("reported", "warning", stage, device.name, why, row["fix"])


def check_version_on(device: Device, version: Version) -> Iterator[Finding]:
    """A finding when no JetPack of the device has this TensorRT."""
    if not device.jetson:
        return
    eleven = tables()["tensorrt_11_on_jetson"]
    if version.major < 11:
        yield from _check_jetpack(device, version)
    elif version < Version.parse(eleven["first"]):
        why = f"TensorRT {version} does not run on {device.title}: 11.0 to 11.4.0 support no JetPack"
        fix = f"take TensorRT {eleven['first']} (JetPack {eleven['jetpack']}) or {_versions(device)}"
        yield Finding("device-tensorrt", "error", BUNDLE, device.name, why, fix)
    elif device.name not in eleven["devices"]:
        why = f"TensorRT {version} on {device.title}: NVIDIA names AGX Orin and Thor only (unverified)"
        yield Finding("device-tensorrt", "warning", BUNDLE, device.name, why, f"or take {_versions(device)}")


def _check_jetpack(device: Device, version: Version) -> Iterator[Finding]:
    rows = [row for row in tables()["jetpacks"] if device.family in row["families"]]
    releases = [Version.parse(row["tensorrt"]) for row in rows]
    if not any((one.major, one.minor) == (version.major, version.minor) for one in releases):
        why = f"no JetPack for {device.title} has TensorRT {version}; it has {_versions(device)}"
        fix = "name the version that the board has (`dpkg -l tensorrt` there)"
        yield Finding("device-tensorrt", "error", BUNDLE, device.name, why, fix)


def _versions(device: Device) -> str:
    rows = [row for row in tables()["jetpacks"] if device.family in row["families"]]
    return ", ".join(f"{row['tensorrt']} (JetPack {row['jetpack']})" for row in rows)
