"""Torch-TensorRT: what it is given, and what is said without it. A double stands for the library: it runs the traced
program in PyTorch on the CPU, at the shapes of the profile alone.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bridgeport.bundle import Bundle
from bridgeport.errors import DependencyError, EngineError, InputError, UnsupportedError
from bridgeport.models import load_checkpoint
from bridgeport.runtime.backends import EngineOptions, load_engines
from bridgeport.runtime.onnxruntime import load_engine
from bridgeport.runtime.torch_tensorrt import TorchTensorRtEngine, compile_stage

GetPath = Callable[[str], Path]
NAME = "llama-gqa-tied"


class InputDouble:
    """`torch_tensorrt.Input`: a shape, or three of them."""

    def __init__(self, *, dtype: torch.dtype, shape: Any = None, min_shape: Any = None, opt_shape: Any = None,
                 max_shape: Any = None) -> None:  # fmt: skip
        self.dtype, self.bounds = dtype, (shape or min_shape, shape or opt_shape, shape or max_shape)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    calls: list[dict[str, Any]] = []

    def compile_program(program: Any, *, inputs: Any, device: str, disable_tf32: bool) -> Any:
        assert isinstance(program, torch.export.ExportedProgram)
        calls.append({"inputs": inputs, "device": device, "disable_tf32": disable_tf32})
        return program.module()

    module = SimpleNamespace(
        __version__="2.14.0", Input=InputDouble, dynamo=SimpleNamespace(compile=compile_program), calls=calls
    )
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    return module


@pytest.fixture(scope="module")
def bundle(blip2_bundle: GetPath) -> Bundle:
    return Bundle.load(blip2_bundle(NAME))


def options(blip2_checkpoint: GetPath, device: str = "cuda") -> EngineOptions:
    return EngineOptions(device, 1, blip2_checkpoint(NAME))


def test_without_the_library(bundle: Bundle, blip2_checkpoint: GetPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(DependencyError, match=r"needs torch and torch_tensorrt .*`pip install torch-tensorrt`"):
        load_engines("torch-tensorrt", bundle, options(blip2_checkpoint))


def test_bad_options(bundle: Bundle, blip2_checkpoint: GetPath) -> None:
    with pytest.raises(InputError, match="pass checkpoint=DIR"):
        load_engines("torch-tensorrt", bundle, EngineOptions("cuda"))
    with pytest.raises(InputError, match="device 'cpu': the engine torch-tensorrt runs on a GPU"):
        load_engines("torch-tensorrt", bundle, options(blip2_checkpoint, "cpu"))
    stages = tuple(stage.model_copy(update={"precision": "int8"}) for stage in bundle.manifest.stages)
    other = Bundle(bundle.path, bundle.manifest.model_copy(update={"stages": stages}))
    with pytest.raises(UnsupportedError, match="its encoder is int8, and the engine torch-tensorrt compiles"):
        load_engines("torch-tensorrt", other, options(blip2_checkpoint))


def test_without_a_gpu(bundle: Bundle, blip2_checkpoint: GetPath, library: SimpleNamespace) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; run `pytest -m gpu` for it")
    with pytest.raises(DependencyError, match="torch sees no CUDA GPU"):
        load_engines("torch-tensorrt", bundle, options(blip2_checkpoint))


@pytest.mark.parametrize("stage", ["encoder", "connector"])
def test_a_stage_is_compiled_at_the_shapes_of_its_contract(
    stage: str, bundle: Bundle, blip2_checkpoint: GetPath, library: SimpleNamespace
) -> None:
    contract = bundle.manifest.stage(stage).contract
    module = load_checkpoint(blip2_checkpoint(NAME)).load_stage(stage)
    engine = TorchTensorRtEngine(contract, compile_stage(module, contract, "cpu"), "cpu")
    (call,) = library.calls
    assert call["disable_tf32"]
    batch = contract.axis("batch")
    for spec, given in zip(contract.inputs, call["inputs"], strict=True):
        sizes = [shape[0] for shape in given.bounds]
        assert sizes == [batch.min, batch.opt, batch.max]
        assert given.bounds[0][1:] == spec.shape[1:]
        assert given.dtype == getattr(torch, spec.dtype)
    (output,) = contract.outputs
    reference = load_engine(bundle, stage, EngineOptions(threads=1))
    for rows in (1, 3):  # another batch than the traced one
        shape = [rows if isinstance(dim, str) else dim for dim in contract.inputs[0].shape]
        values = {contract.inputs[0].name: np.random.default_rng(rows).normal(size=shape).astype(np.float32)}
        # Two orders of FP32 sums; TF32 would be 1e-3 away.
        np.testing.assert_allclose(
            engine.run(values)[output.name], reference.run(values)[output.name], atol=3e-5, rtol=1e-4
        )
    engine.close()
    with pytest.raises(EngineError, match=f"{stage}: the engine is closed"):
        engine.run(values)


def test_what_does_not_compile_says_so(bundle: Bundle, blip2_checkpoint: GetPath, library: SimpleNamespace) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("no converter\nfor aten.foo")

    library.dynamo.compile = refuse
    contract = bundle.manifest.stage("connector").contract
    module = load_checkpoint(blip2_checkpoint(NAME)).load_stage("connector")
    said = (
        r"connector: Torch-TensorRT does not compile it \(AssertionError: no converter for aten.foo\); use the engine"
    )
    with pytest.raises(EngineError, match=said):
        compile_stage(module, contract, "cpu")


def test_the_arguments_are_those_of_the_genuine_library() -> None:
    """Where it is installed (it imports on a machine with its TensorRT alone)."""
    try:
        torch_tensorrt = importlib.import_module("torch_tensorrt")
    except (ImportError, OSError) as error:
        pytest.skip(f"needs torch_tensorrt and its TensorRT ({str(error)[:80]}): pip install torch-tensorrt")
    parameters = inspect.signature(torch_tensorrt.dynamo.compile).parameters
    assert {"inputs", "device", "disable_tf32"} <= set(parameters)
