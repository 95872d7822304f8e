"""Which GPU, driver and Jetson this is, and how it is told when none can be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.export.tensorrt.libcuda import compile_libcuda

from bridgeport.errors import DependencyError, UnsupportedError
from bridgeport.runtime.tensorrt.machine import driver_version, find_machine, jetpack_of, l4t_release


def test_the_first_device_is_read_from_the_driver(tmp_path: Path) -> None:
    machine = find_machine("11.4.0.106", library=compile_libcuda(tmp_path))
    assert (machine.gpu, machine.compute_capability, machine.memory) == ("NVIDIA L4", "8.9", 24 << 30)
    assert (machine.cuda, machine.tensorrt) == ("13.0", "11.4.0.106")


def test_no_driver(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match=r"there is no NVIDIA driver here .*; install NVIDIA's driver"):
        find_machine("11.4", library=str(tmp_path / "libcuda.so.1"))


def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"sees no usable GPU \(cuInit: CUDA_ERROR_NO_DEVICE\).*bridgeport pack"):
        find_machine("11.4", library=compile_libcuda(tmp_path, init=100))


def test_a_driver_that_serves_no_device(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="sees no GPU; check CUDA_VISIBLE_DEVICES"):
        find_machine("11.4", library=compile_libcuda(tmp_path, devices=0))


def test_a_driver_that_is_too_old(tmp_path: Path) -> None:
    library = compile_libcuda(tmp_path, cuda=12040)
    with pytest.raises(DependencyError, match=r"serves CUDA 12.4, TensorRT 11.4 needs CUDA 13; .*580.65.06 or newer"):
        find_machine("11.4", library=library)
    assert find_machine("10.16.1", library=library).cuda == "12.4"  # made with CUDA 12
    assert find_machine("11.4", cuda_major=12, library=library).cuda == "12.4"  # the cu12 wheel of 11.4
    with pytest.raises(DependencyError, match=r"TensorRT 10.16 needs CUDA 13"):
        find_machine("10.16", cuda_major=13, library=library)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:00:00 UTC 2026\n", "580.65.06"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n", "540.4.0"),
        ("something else\n", None),
    ],
)
def test_the_drivers_version(text: str, version: str | None, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version


def test_jetson_releases(tmp_path: Path) -> None:
    release = tmp_path / "nv_tegra_release"
    assert l4t_release(release) is None
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    assert l4t_release(release) == "36.4.3"
    found = {name: jetpack_of(name) for name in ("36.4", "36.4.3", "36.4.9", "36.5.0", "39.2.1", "35.4.1")}
    assert found == {
        "36.4": "6.1",
        "36.4.3": "6.2",
        "36.4.9": "6.2.1",
        "36.5.0": "6.2.2",
        "39.2.1": "7.2.1",
        "35.4.1": None,
    }
