"""Places that cannot be written, or would take what is read with them, are refused before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bridgeport.calibration import QuantizeOptions, quantize_bundle
from bridgeport.calibration.paths import check_places
from bridgeport.errors import InputError, OutputError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "manifest.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("bundle", "--output .*bundle is the bundle itself, which is only read"),
        ("bundle/int8", "--output .*bundle/int8 lies in the bundle .*bundle, which is only read"),
        ("link/int8", "--output .*link/int8 lies in the bundle"),
        (".", "holds .*bundle, so it is never replaced"),
        ("pictures", "holds .*pictures, so it is never replaced"),
        ("file/out", "--output .*file/out cannot be written: .*file is no directory"),
    ],
)
def test_an_output_that_would_take_an_input_with_it(bundle: Path, tmp_path: Path, out: str, message: str) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to(bundle)
    with pytest.raises(OutputError, match=message) as caught:
        check_places(bundle, tmp_path / out, kept=(pictures,), force=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file", "--cache .*file cannot be written: .*file is no directory; name another place"),
        ("file/cache", "--cache .*file/cache cannot be written: .*file is no directory"),
        ("bundle/cache", "--cache .*bundle/cache lies in the bundle .*bundle; name a place outside of it"),
        ("out/cache", "--cache .*out/cache lies in the bundle .*out; name a place"),
    ],
)
def test_a_directory_that_cannot_be_written(bundle: Path, tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=message):
        check_places(bundle, tmp_path / "out", directories={"--cache": tmp_path / path})
    assert not (tmp_path / "out").exists()


def test_a_directory_without_the_right_to_write(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who is not root: what would be made is asked of the directory above that exists."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path.resolve())
    with pytest.raises(OutputError, match=r"--report .*new/report cannot be written: no right to write in .*; name"):
        check_places(bundle, work / "out", directories={"--report": tmp_path / "new" / "report"})
    with pytest.raises(OutputError, match=r"--output .*new/out cannot be written: no right to write in"):
        check_places(bundle, tmp_path / "new" / "out")


def test_a_file_that_is_a_directory(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "inputs.npz").mkdir()
    with pytest.raises(OutputError, match=r"--save-inputs .*inputs\.npz is a directory; name a file"):
        check_places(bundle, tmp_path / "out", files={"--save-inputs": tmp_path / "inputs.npz"})


def test_good_places_pass_and_nothing_is_made(bundle: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    check_places(
        bundle,
        tmp_path / "bundle-int8",  # begins with the bundle's name, and is not in it
        directories={"--cache": tmp_path / "new" / "cache", "--report": None},
        files={"--save-inputs": tmp_path / "inputs.npz"},
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "error"),
    [({"cache": "bundle/cache"}, OutputError), ({"save_inputs": "inputs.txt"}, InputError)],
)
def test_quantize_asks_before_it_opens_the_bundle(
    bundle: Path, tmp_path: Path, options: dict[str, str], error: type[Exception]
) -> None:
    """The bundle here is none, which would be the next error."""
    paths: dict[str, Any] = {name: tmp_path / place for name, place in options.items()}
    with pytest.raises(error, match=r"name a place outside|no name for tensors"):
        quantize_bundle(bundle, tmp_path / "out", tmp_path / "nowhere", QuantizeOptions("int8", **paths))
