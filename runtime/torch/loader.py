"""A checkpoint directory to PyTorch engines of its stages."""

from __future__ import annotations

from ...bundle import Bundle
from ...errors import CheckpointError, DependencyError, InputError, UnsupportedError
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
    from ...models import load_checkpoint

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = load_checkpoint(options.checkpoint)
    if bundle.manifest.reduction is not None:
        from ...models.reduction import reduce_tokens

        model = reduce_tokens(model, bundle.manifest.reduction)
    engines: dict[str, Engine] = {}
    for stage in bundle.manifest.stages:
        contract = stage.contract
        if model.contracts.get(contract.name) != contract:
            raise CheckpointError(
                f"{options.checkpoint}: its stage {contract.name} is not that of the bundle (shapes or axes "
                "differ); name the checkpoint that the bundle was exported from"
            )
        module = model.load_stage(contract.name)
        cache = bundle.manifest.kv_cache
        if contract.name == "llm" and cache is not None:
            engines["llm"] = TorchLanguageModel(contract, module, cache)
        else:
            engines[contract.name] = TorchEngine(contract, module)
    return engines
