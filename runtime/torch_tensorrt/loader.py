"""A checkpoint directory to modules that Torch-TensorRT has compiled at the contracts' shapes."""

from __future__ import annotations

import logging
from typing import Any

from ...bundle import Bundle
from ...errors import DependencyError, EngineError, InputError, UnsupportedError
from ...models.contract import StageContract, TensorSpec
from ..backends import EngineOptions
from ..engine import Engine
from ..onnxruntime import Device
from ..torch.loader import load_model, load_module
from .runner import TorchTensorRtEngine

logger = logging.getLogger(__name__)

COMPILED = ("encoder", "connector", "video_connector")
_EXAMPLE = 2  # an axis that is 1 while it is traced stays 1


def load_engines(bundle: Bundle, options: EngineOptions) -> dict[str, Engine]:
    """Encoder and connector compiled from `options.checkpoint` in FP32, the other stages on ONNX Runtime's CUDA.

    Torch-TensorRT gets no decoder: its key/value cache would be copied at every step. Raises InputError without a
    checkpoint or a GPU as device, UnsupportedError for a bundle in another precision, DependencyError when a library is
    missing, CheckpointError for a checkpoint of another shape, EngineError when a stage does not compile.
    """
    if options.checkpoint is None:
        raise InputError(
            "the engine torch-tensorrt compiles a checkpoint, not the bundle's graphs; pass checkpoint=DIR"
        )
    device = Device.parse(options.device)
    if device.type != "cuda":
        raise InputError(f"device {options.device!r}: the engine torch-tensorrt runs on a GPU; use cuda or cuda:N")
    _check_precision(bundle)
    torch, compiler = import_torch_tensorrt()
    if not torch.cuda.is_available():
        raise DependencyError("torch sees no CUDA GPU; see `bridgeport doctor`, or use the engine onnxruntime")
    from ..onnxruntime import load_engine

    model = load_model(bundle, options.checkpoint)
    engines: dict[str, Engine] = {}
    for stage in bundle.manifest.stages:
        contract = stage.contract
        if contract.name not in COMPILED:
            engines[contract.name] = load_engine(bundle, contract.name, options)
            continue
        logger.info("%s: compiling with Torch-TensorRT %s", contract.name, compiler.__version__)
        module = load_module(model, contract, options.checkpoint)
        place = f"cuda:{device.index}"
        engines[contract.name] = TorchTensorRtEngine(contract, compile_stage(module, contract, place), place)
    return engines


def import_torch_tensorrt() -> tuple[Any, Any]:
    """The modules `torch` and `torch_tensorrt`; DependencyError says how to install them."""
    try:
        import torch
        import torch_tensorrt  # type: ignore[import-not-found]
    except (ImportError, OSError) as error:  # a TensorRT of another version than it was made with: OSError
        reason = " ".join(str(error).split())[:200]
        raise DependencyError(
            f"the engine torch-tensorrt needs torch and torch_tensorrt ({reason}); install the pair that belongs "
            "together with `pip install torch-tensorrt`, or use the engine onnxruntime"
        ) from error
    return torch, torch_tensorrt


def compile_stage(module: Any, contract: StageContract, device: str) -> Any:
    """`module` compiled for `device` with one optimization profile: min, opt and max of the contract's axes.

    It is traced here with the contract's axes, so that tensors share them; TF32 is off, as FP32 promises. Raises
    EngineError when it cannot be traced or compiled.
    """
    torch, compiler = import_torch_tensorrt()
    module = module.eval().to(device)
    dims = {axis.name: torch.export.Dim(axis.name, min=axis.min, max=axis.max) for axis in contract.axes}
    shapes = tuple(
        {at: dims[dim] for at, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in contract.inputs
    )
    examples = tuple(_example(torch, contract, spec, device) for spec in contract.inputs)
    inputs = [_profile(torch, compiler, contract, spec) for spec in contract.inputs]
    try:
        with torch.no_grad():
            program = torch.export.export(module, examples, dynamic_shapes=shapes)
            return compiler.dynamo.compile(program, inputs=inputs, device=device, disable_tf32=True)
    except Exception as error:
        # Both libraries raise whatever their parts do.
        reason = " ".join(str(error).split())[:300]
        raise EngineError(
            f"{contract.name}: Torch-TensorRT does not compile it ({type(error).__name__}: {reason}); use the engine "
            "onnxruntime or tensorrt"
        ) from error


def _example(torch: Any, contract: StageContract, spec: TensorSpec, device: str) -> Any:
    sizes = {axis.name: max(axis.min, min(_EXAMPLE, axis.max)) for axis in contract.axes}
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
    dtype = getattr(torch, spec.dtype)
    ones = torch.ones if not dtype.is_floating_point else torch.rand
    return ones(shape, dtype=dtype, device=device)


def _profile(torch: Any, compiler: Any, contract: StageContract, spec: TensorSpec) -> Any:
    """`torch_tensorrt.Input` of one tensor."""
    bounds = {
        f"{bound}_shape": tuple(
            int(getattr(contract.axis(dim), bound)) if isinstance(dim, str) else dim for dim in spec.shape
        )
        for bound in ("min", "opt", "max")
    }
    dtype = getattr(torch, spec.dtype)
    if not any(isinstance(dim, str) for dim in spec.shape):
        return compiler.Input(shape=bounds["opt_shape"], dtype=dtype)
    return compiler.Input(**bounds, dtype=dtype)


def _check_precision(bundle: Bundle) -> None:
    for stage in bundle.manifest.stages:
        if stage.contract.name in COMPILED and stage.precision != "fp32":
            raise UnsupportedError(
                f"{bundle.path}: its {stage.contract.name} is {stage.precision}, and the engine torch-tensorrt "
                "compiles the checkpoint in FP32; use the engine tensorrt or onnxruntime"
            )
