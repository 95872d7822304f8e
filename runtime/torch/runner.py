"""Stages as PyTorch modules behind the same interface, the language model over the same cache buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import EngineError
from ...models.contract import KvCacheContract, StageContract
from ..engine import Arrays, Call, Engine
from ..kv_cache import HostBuffer, KvCache


class TorchEngine(Engine):
    """A module that takes the contract's inputs in order and gives its only output."""

    def __init__(self, contract: StageContract, module: Any) -> None:
        super().__init__(contract)
        self._module = module

    def close(self) -> None:
        self._module = None

    def _bind(self, inputs: Arrays, outputs: Arrays, cache: KvCache | None) -> Call:
        import torch

        module = _open(self._module, self.contract.name)
        tensors = [torch.from_numpy(inputs[spec.name]) for spec in self.contract.inputs]
        (output,) = (outputs[spec.name] for spec in self.contract.outputs)

        @torch.inference_mode()
        def call() -> None:
            output[...] = module(*tensors).numpy()

        return call


class TorchLanguageModel(Engine):
    """A transformers causal language model, rows of different lengths in one batch.

    A call whose mask is as long as its input is a prefill: rows right-padded, the mask their lengths. In any
    other call the input's last position of row `b` stands at `attention_mask[b].sum() - 1`. Positions are those,
    unless the contract has `position_ids`. The cache buffers are host memory; the model's own cache lives for one call.
    """

    def __init__(self, contract: StageContract, module: Any, kv_cache: KvCacheContract) -> None:
        super().__init__(contract, kv_cache)
        self._module = module

    def close(self) -> None:
        self._module = None

    def _bind(self, inputs: Arrays, outputs: Arrays, cache: KvCache | None) -> Call:
        import torch

        module = _open(self._module, "llm")
        if cache is None:
            raise EngineError("llm: bind needs a cache; make one with allocate_cache")
        embeds, mask = torch.from_numpy(inputs["inputs_embeds"]), inputs["attention_mask"]
        batch, length = embeds.shape[:2]
        buffers = [torch.from_numpy(array[:batch]) for array in _arrays(cache)]

        @torch.inference_mode()
        def call() -> None:
            past = np.zeros(batch, np.int64) if mask.shape[1] == length else mask.sum(1) - length
            new = np.ones((batch, length), np.int64) if past.any() else mask[:, :length]
            # The model sees [longest past | new]; the gap before a shorter past is masked. Before and not behind it, so
            # that a sliding window counts back over tokens only.
            longest = int(past.max())
            seen = np.concatenate([np.arange(longest) >= longest - past[:, None], new], axis=1).astype(np.int64)
            output = module(
                inputs_embeds=embeds,
                attention_mask=torch.from_numpy(seen),
                position_ids=torch.from_numpy(inputs.get("position_ids", past[:, None] + np.arange(length))),
                past_key_values=_own_cache(buffers, past),
                use_cache=True,
            )
            _write_back(buffers, output.past_key_values, past, length)
            rows = np.arange(batch)
            outputs["logits"][...] = output.logits.numpy()[rows, inputs["logits_position"]]

        return call


def _open(module: Any, stage: str) -> Any:
    if module is None:
        raise EngineError(f"{stage}: the engine is closed; load the bundle again")
    return module


def _arrays(cache: KvCache) -> list[NDArray[Any]]:
    buffers = [buffer for _, _, buffer in cache.bindings()]
    host = [buffer.array for buffer in buffers if isinstance(buffer, HostBuffer)]
    if len(host) != len(buffers):
        raise EngineError("llm: the PyTorch engine reads a cache in host memory only; make it with its allocate_cache")
    return host


def _own_cache(buffers: list[Any], past: NDArray[np.int64]) -> Any:
    """The pasts of all rows with their ends side by side; what is left over in the buffers is not in it."""
    from transformers import DynamicCache

    # Without the model's config: layers with a sliding window would keep less than a window.
    cache = DynamicCache()
    if longest := int(past.max()):
        for layer in range(len(buffers) // 2):
            key, value = (_aligned(buffer, past, longest) for buffer in buffers[2 * layer : 2 * layer + 2])
            cache.update(key, value, layer)
    return cache


def _aligned(buffer: Any, past: NDArray[np.int64], longest: int) -> Any:
    aligned = buffer.new_zeros((*buffer.shape[:2], longest, buffer.shape[3]))
    for row, count in enumerate(past.tolist()):
        aligned[row, :, longest - count :] = buffer[row, :, :count]
    return aligned


def _write_back(buffers: list[Any], cache: Any, past: NDArray[np.int64], length: int) -> None:
    for layer in range(len(buffers) // 2):
        new = cache.layers[layer].keys, cache.layers[layer].values
        for buffer, tensor in zip(buffers[2 * layer : 2 * layer + 2], new, strict=True):
            for row, start in enumerate(past.tolist()):
                buffer[row, :, start : start + length] = tensor[row, :, -length:]
