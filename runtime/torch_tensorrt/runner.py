"""A stage as a module that Torch-TensorRT compiled, fed from host memory."""

from __future__ import annotations

from typing import Any

from ...errors import EngineError
from ...models.contract import StageContract
from ..engine import Arrays, Call, Engine
from ..kv_cache import KvCache


class TorchTensorRtEngine(Engine):
    """`module` on `device`, with the contract's inputs in order and its only output. Host arrays are copied there."""

    def __init__(self, contract: StageContract, module: Any, device: str) -> None:
        super().__init__(contract)
        self._module = module
        self._device = device

    def close(self) -> None:
        self._module = None

    def _bind(self, inputs: Arrays, outputs: Arrays, cache: KvCache | None) -> Call:
        import torch

        if self._module is None:
            raise EngineError(f"{self.contract.name}: the engine is closed; load the bundle again")
        module, stage, device = self._module, self.contract.name, self._device
        arrays = [torch.from_numpy(inputs[spec.name]) for spec in self.contract.inputs]
        (output,) = (torch.from_numpy(outputs[spec.name]) for spec in self.contract.outputs)

        @torch.inference_mode()
        def call() -> None:
            try:
                found = module(*(array.to(device) for array in arrays))
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                raise EngineError(f"{stage}: Torch-TensorRT failed: {reason}") from error
            output.copy_(found[0] if isinstance(found, (tuple, list)) else found)  # waits for the device

        return call
