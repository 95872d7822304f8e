"""Versions, and modules that cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.tensorrt.double import install_double

from bridgeport.errors import DependencyError, InputError
from bridgeport.runtime.tensorrt.api import load_api
from bridgeport.runtime.tensorrt.versions import FEATURES, Version


def test_versions() -> None:
    assert Version.parse("11.4.0.106") > Version.parse("11.4") > Version.parse("10.16.2") > Version.parse("10.3")
    assert str(Version.parse("10.16")) == "10.16"
    assert Version.parse("10.3.0.dev1") == Version.parse("10.3")
    with pytest.raises(InputError, match="is not one"):
        Version.parse("ten")
    assert FEATURES["weak_typing"].available(Version.parse("10.16"))
    assert not FEATURES["weak_typing"].available(Version.parse("11.0"))


def test_modules_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DependencyError, match=r"JetPack .* elsewhere `pip install tensorrt`"):
        load_api()
    double = install_double(monkeypatch)
    double.module.__dict__["__version__"] = "8.6.2"
    with pytest.raises(DependencyError, match=r"8\.6\.2 is installed, 10\.3 or newer"):
        load_api()
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DependencyError, match=r"does not load \(libnvinfer"):
        load_api()
