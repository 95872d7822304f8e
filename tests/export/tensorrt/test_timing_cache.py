"""The shared timing cache and the lock of the device, with several builders."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.export.tensorrt.bundles import MACHINE

from bridgeport.errors import OutputError
from bridgeport.export.tensorrt.timing_cache import device_lock, merge_timing_cache, timing_cache_file


def combine(parts: list[bytes]) -> bytes:
    """Words of all parts, each once."""
    return b" ".join(sorted({word for part in parts for word in part.split()}))


def test_the_name_holds_all_that_a_timing_depends_on(tmp_path: Path) -> None:
    software = ({"tensorrt": "10.16.1"}, {"cuda": "13.0"})
    changes: tuple[dict[str, str], ...] = ({}, *software, {"gpu": "NVIDIA L4"}, {"compute_capability": "8.9"})
    names = {timing_cache_file(MACHINE.model_copy(update=change), tmp_path).name for change in changes}
    assert len(names) == len(changes)
    assert "timing_10.3.0.30_Orin_sm8.7_cuda12.6.cache" in names


def test_the_users_cache_directory_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BRIDGEPORT_CACHE", str(tmp_path))
    assert timing_cache_file(MACHINE).parent == tmp_path / "tensorrt"
    monkeypatch.delenv("BRIDGEPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert timing_cache_file(MACHINE).parent == tmp_path / "bridgeport" / "tensorrt"


def test_nothing_that_concurrent_builders_measured_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "timing.cache"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda at: merge_timing_cache(file, f"k{at}".encode(), combine), range(40)))
    assert set(file.read_bytes().split()) == {f"k{at}".encode() for at in range(40)}
    assert {path.name for path in tmp_path.iterdir()} == {"timing.cache", "timing.cache.lock"}


def test_a_cache_that_cannot_be_merged_is_replaced(tmp_path: Path) -> None:
    def refuse(parts: list[bytes]) -> bytes:
        raise ValueError("damaged")

    file = tmp_path / "timing.cache"
    file.write_bytes(b"damaged")
    merge_timing_cache(file, b"fresh", refuse)
    assert file.read_bytes() == b"fresh"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written .*--no-timing-cache"):
        merge_timing_cache(tmp_path / "file" / "timing.cache", b"x", combine)


def test_a_second_build_on_the_device_waits_and_says_so(tmp_path: Path) -> None:
    told, order = threading.Event(), []

    def second() -> None:
        def wait(text: str) -> None:
            order.append(text)
            told.set()

        with device_lock(MACHINE, wait, tmp_path):
            order.append("second")

    with device_lock(MACHINE, order.append, tmp_path):
        other = threading.Thread(target=second)
        other.start()
        assert told.wait(10)
        order.append("first")
    other.join(10)
    assert order[0].startswith("waiting for another build on this GPU (process ")
    assert order[1:] == ["first", "second"]
