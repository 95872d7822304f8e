"""Which GPU, driver and Jetson this is, asked of the driver itself: no CUDA toolkit and no Python package is needed.

Asked before TensorRT is, because without a device its libraries crash or answer with a null pointer.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import re
from contextlib import suppress
from pathlib import Path

from ...engine_record import MachineRecord
from ...errors import DependencyError, UnsupportedError

# cuda.h: CUdevice_attribute.
_MAJOR, _MINOR = 75, 76
# L4T release -> JetPack; the newest entry that is not newer than the board's release counts.
JETPACKS = {
    (36, 3): "6.0",
    (36, 4): "6.1",
    (36, 4, 3): "6.2",
    (36, 4, 4): "6.2.1",
    (36, 5): "6.2.2",
    (38, 2): "7.0",
    (38, 4): "7.1",
    (39, 2): "7.2",
    (39, 2, 1): "7.2.1",
}
# Major version of the CUDA that TensorRT was made with -> the oldest driver that serves it (on Linux, not a Jetson).
# NVIDIA, CUDA Toolkit Release Notes, "CUDA Toolkit and Minimum Required Driver Version for CUDA Minor Version
# Compatibility".
DRIVERS = {12: "525.60.13", 13: "580.65.06"}
_INSTALL = "install NVIDIA's driver, on a Jetson by flashing JetPack; see `bridgeport doctor`"


def find_machine(tensorrt: str, *, cuda_major: int | None = None, library: str = "libcuda.so.1") -> MachineRecord:
    """The first CUDA device of this machine.

    `tensorrt`: the version of the installed module; `cuda_major`: of the CUDA that it was made with, by default what
    the version tells. Raises DependencyError without a driver or with one that is too old, UnsupportedError when the
    driver sees no device.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError as error:
        raise DependencyError(f"there is no NVIDIA driver here ({library} does not load); {_INSTALL}") from error
    if (status := driver.cuInit(0)) != 0:
        name = _error_name(driver, status)
        raise UnsupportedError(
            f"the NVIDIA driver sees no usable GPU (cuInit: {name}); TensorRT builds and runs on an NVIDIA GPU alone: "
            "use such a machine, or take the bundle there with `bridgeport pack`"
        )
    cuda = _integer(driver, "cuDriverGetVersion")
    version, number = f"{cuda // 1000}.{cuda % 1000 // 10}", driver_version()
    _check_driver(tensorrt, cuda // 1000, version, number, cuda_major)
    if _integer(driver, "cuDeviceGetCount") < 1:
        raise UnsupportedError("the NVIDIA driver sees no GPU; check CUDA_VISIBLE_DEVICES and `nvidia-smi`")
    device = _integer(driver, "cuDeviceGet", 0)
    gpu, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(driver, "cuDeviceGetName", gpu, 256, device)
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    capability = [_integer(driver, "cuDeviceGetAttribute", which, device) for which in (_MAJOR, _MINOR)]
    l4t = l4t_release()
    return MachineRecord(
        platform=f"{platform.system().lower()}-{platform.machine()}",
        gpu=gpu.value.decode(errors="replace"),
        compute_capability=".".join(str(part) for part in capability),
        memory=memory.value,
        tensorrt=tensorrt,
        cuda=version,
        driver=number,
        l4t=l4t,
        jetpack=None if l4t is None else jetpack_of(l4t),
    )


def cuda_of_wheel() -> int | None:
    """Major version of the CUDA that the installed wheel of TensorRT is made for; None for JetPack's own package."""
    for major in (13, 12):
        with suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(f"tensorrt_cu{major}_bindings")
            return major
    return None


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The kernel module's version, "580.65.06"; None where it does not tell."""
    if not file.is_file():
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text(encoding="utf-8", errors="replace"))
    return found.group(1) if found else None


def l4t_release(file: Path = Path("/etc/nv_tegra_release")) -> str | None:
    """The Jetson Linux release, "36.4.3"; None on anything but a Jetson."""
    if not file.is_file():
        return None
    found = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", file.read_text(encoding="utf-8", errors="replace"))
    return f"{found.group(1)}.{found.group(2)}" if found else None


def jetpack_of(l4t: str) -> str | None:
    """The JetPack that holds an L4T release; None for one that is older than 6.0."""
    release = tuple(int(part) for part in l4t.split("."))
    older = [key for key in JETPACKS if key <= release]
    return JETPACKS[max(older)] if older else None


def _check_driver(tensorrt: str, served: int, cuda: str, number: str | None, wanted: int | None) -> None:
    # TensorRT 11 is made with CUDA 13 unless its package is a cu12 one; JetPack and the wheels of 10 start at CUDA 12.
    needed = wanted or (13 if int(tensorrt.split(".")[0]) >= 11 else 12)
    if served >= needed:
        return
    oldest = DRIVERS.get(needed)
    least = f" ({oldest} or newer on Linux)" if oldest else ""
    raise DependencyError(
        f"the NVIDIA driver {number or ''} serves CUDA {cuda}, TensorRT {tensorrt} needs CUDA {needed}; install a "
        f"newer driver{least}, or an older TensorRT"
    )


def _integer(driver: ctypes.CDLL, function: str, *arguments: int) -> int:
    """The integer that a function of the driver writes to its first argument."""
    value = ctypes.c_int()
    _call(driver, function, ctypes.byref(value), *arguments)
    return value.value


def _call(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    status = getattr(driver, function)(*arguments)
    if status != 0:
        raise UnsupportedError(f"the NVIDIA driver refuses {function} ({_error_name(driver, status)}); {_INSTALL}")


def _error_name(driver: ctypes.CDLL, status: int) -> str:
    name = ctypes.c_char_p()
    found = driver.cuGetErrorName(status, ctypes.byref(name)) == 0 and name.value
    return name.value.decode() if found and name.value else f"error {status}"
