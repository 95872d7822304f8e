"""A checkpoint directory to PyTorch engines of its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...bundle import Bundle
from ...errors import CheckpointError, DependencyError, InputError, UnsupportedError
from ...models.contract import StageContract
from ..backends import EngineOptions
from ..engine import Engine
from .runner import TorchEngine, TorchLanguageModel


def load_engines(bundle: Bundle, options: EngineOptions) -> dict[str, Engine]:
    """An engine per stage of `bundle`, FP32 on the CPU, with the weights of `options.checkpoint`.

    `options.threads` sets PyTorch's thread count, which the whole process shares. Raises InputError without a
    checkpoint or for another device, DependencyError without PyTorch, CheckpointError when the checkpoint
    cannot be read or is of another shape than the bundle.
    """
    if options.checkpoint is None:
        raise InputError("the PyTorch engine runs a checkpoint, not the bundle's graphs; pass checkpoint=DIR")
    if options.device != "cpu":
        raise InputError(f"device {options.device!r}: the PyTorch engine is the reference and runs on cpu only")
    if bundle.manifest.flamingo is not None:
        raise UnsupportedError(
            f"{bundle.path}: the PyTorch engine has no cross-attention over pictures; run it with onnxruntime"
        )
    try:
        import torch
    except ImportError as error:
        raise DependencyError(
            f"the PyTorch engine needs torch ({error}); install it with `pip install 'bridgeport[export]'`"
        ) from error
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = load_model(bundle, options.checkpoint)
    engines: dict[str, Engine] = {}
    for stage in bundle.manifest.stages:
        contract = stage.contract
        module = load_module(model, contract, options.checkpoint)
        cache = bundle.manifest.kv_cache
        if contract.name == "llm" and cache is not None:
            engines["llm"] = TorchLanguageModel(contract, module, cache)
        else:
            engines[contract.name] = TorchEngine(contract, module)
    return engines


def load_model(bundle: Bundle, checkpoint: Path) -> Any:
    """The checkpoint's model, with the bundle's reduction of tokens. CheckpointError when it cannot be read."""
    from ...models import load_checkpoint

    model = load_checkpoint(checkpoint)
    if bundle.manifest.reduction is None:
        return model
    from ...models.reduction import reduce_tokens

    return reduce_tokens(model, bundle.manifest.reduction)


def load_module(model: Any, contract: StageContract, checkpoint: Path) -> Any:
    """The module of the bundle's stage `contract`. CheckpointError when `model` has it otherwise."""
    if model.contracts.get(contract.name) != contract:
        raise CheckpointError(
            f"{checkpoint}: its stage {contract.name} is not that of the bundle (shapes or axes differ); name the "
            "checkpoint that the bundle was exported from"
        )
    return model.load_stage(contract.name)
