"""The double: what is not in the listing is not there, and what a CUDA double or a child process needs of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tensorrt.double import TensorRtDouble, install_double, write_module
from tests.tensorrt.small_model import WEIGHT, build, run, write_small_model

from bridgeport.errors import EngineError
from bridgeport.runtime.tensorrt.api import load_api


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_small_model(tmp_path)


def _planted() -> dict[str, Callable[[TensorRtDouble], object]]:
    def builder(double: TensorRtDouble) -> Any:
        return double.module.Builder(double.module.Logger())

    return {
        "a class": lambda d: d.module.IInt8Calibrator,
        "an enum member": lambda d: d.module.BuilderFlag.FP16,
        "a method": lambda d: builder(d).build_cuda_engine(),
        "a property": lambda d: builder(d).max_batch_size,
        "a property that is set": lambda d: setattr(builder(d), "max_batch_size", 1),
        "a property that is read only": lambda d: setattr(builder(d), "num_DLA_cores", 1),
    }


@pytest.mark.parametrize("what", _planted())
def test_unknown_names_raise(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    with pytest.raises(AttributeError):
        _planted()[what](install_double(monkeypatch))


def test_unfit_arguments_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    trt: Any = install_double(monkeypatch).module
    builder = trt.Builder(trt.Logger())
    config = builder.create_builder_config()
    calls: list[Callable[[], Any]] = [
        lambda: trt.Builder(),
        lambda: trt.Builder(None, 1),
        lambda: builder.create_network(flag=0),
        lambda: builder.create_network("0"),
        lambda: config.set_flag(5),
        lambda: config.set_flag(trt.MemoryPoolType.WORKSPACE),
        lambda: config.set_timing_cache(config.create_timing_cache(b"")),
        lambda: trt.IBuilderConfig(),
        lambda: builder.build_serialized_network(config, config),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
    with pytest.raises(NotImplementedError, match="does not model"):
        builder.build_engine_with_config(builder.create_network(), config)


def test_a_monitor_without_its_base_init(monkeypatch: pytest.MonkeyPatch) -> None:
    trt: Any = install_double(monkeypatch).module

    class Forgetful(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called when overriding"):
        trt.Builder(Forgetful())


def test_a_child_process_has_it_too(tmp_path: Path, model: Path) -> None:
    calls = tmp_path / "calls"
    folder = write_module(tmp_path / "site", "10.3", calls_file=calls)
    code = (
        "from bridgeport.runtime.tensorrt.api import load_api; api = load_api(); print(api.version); "
        "api.create_strongly_typed_network(api.create_builder())"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "10.3.0.30\n", done.stderr
    last = json.loads(calls.read_text().splitlines()[-1])
    assert last == {"name": "Builder.create_network", "arguments": {"flags": 2}}


def test_another_order_is_found(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    double = install_double(monkeypatch)
    api = load_api()
    context = api.create_context(api.deserialize(api.create_runtime(), build(api, model)))
    api.set_input_shape(context, "x", (1, 3))
    api.set_profile(context, 0, 7)
    with pytest.raises(AssertionError, match="not in the order"):
        double.check_order()
    with pytest.raises(EngineError, match="x has no shape"):  # the switch forgot it
        api.execute(context, 7)


def test_work_can_be_held_back(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """A CUDA double captures it, and checks that memory is its own."""
    held: list[tuple[int, Callable[[], None]]] = []
    touched: list[tuple[int, str]] = []
    install_double(
        monkeypatch,
        on_enqueue=lambda stream, work: held.append((stream, work)),
        check_memory=lambda address, size, name: touched.append((size, name)),
    )
    api = load_api()
    x = np.ones((2, 3), np.float32)
    y = run(api, api.deserialize(api.create_runtime(), build(api, model)), x)
    assert y.sum() == 0
    assert held[0][0] == 7
    held[0][1]()
    np.testing.assert_array_equal(y, x @ WEIGHT)
    assert touched == [(24, "x"), (16, "y")]
