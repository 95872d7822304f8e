"""PyTorch's outputs for a corner: the checkpoint's own modules, one stage at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...bundle import Bundle
from .feeds import Feed

if TYPE_CHECKING:
    from ...models.checkpoint import VisionLanguageModel

Outputs = dict[str, NDArray[Any]]
# Decoders that take nothing but a prompt; those with images or an encoder beside it are left to `parity`.
_PROMPT_ALONE = frozenset({"inputs_embeds", "attention_mask", "logits_position"})


class CheckpointReference:
    """Computes what a stage's module does, for stages that have one; of a language model, its prefill.

    `is_other`: whether the bundle names other files than this checkpoint has.
    """

    def __init__(self, bundle: Bundle, checkpoint: str | Path) -> None:
        from ...models import load_checkpoint
        from ...runtime.parity.check import same_checkpoint

        found: VisionLanguageModel = load_checkpoint(checkpoint)
        self.is_other = same_checkpoint(bundle, found) is False
        if bundle.manifest.reduction is not None:
            from ...models.reduction import reduce_tokens

            found = reduce_tokens(found, bundle.manifest.reduction)
        self._checkpoint = found
        self._bundle = bundle
        self._loaded: tuple[str, Any] = ("", None)

    def __call__(self, stage: str, feed: Feed, sizes: Mapping[str, int]) -> Outputs | None:
        """Outputs by name, None where the module cannot be called with the graph's inputs alone."""
        import torch

        contract = self._bundle.manifest.stage(stage).contract
        if stage not in self._checkpoint.contracts:
            return None
        call: Callable[[Any, Feed], Any] = _call_stage
        if stage == "llm":
            if set(feed) & _PROMPT_ALONE != {spec.name for spec in contract.inputs} or sizes.get("past_sequence"):
                return None
            call = _call_decoder
        elif len(contract.outputs) != 1:
            return None
        with torch.inference_mode():
            output = call(self._module(stage), {spec.name: feed[spec.name] for spec in contract.inputs})
        return {contract.outputs[0].name: output.float().numpy()}

    def _module(self, stage: str) -> Any:
        if self._loaded[0] != stage:
            self._loaded = (stage, None)
            self._loaded = (stage, self._checkpoint.load_stage(stage))
        return self._loaded[1]


def _call_stage(module: Any, feed: Feed) -> Any:
    return module(*(_tensor(array) for array in feed.values()))


def _call_decoder(module: Any, feed: Feed) -> Any:
    """Logits `[B, V]` at each row's position; the mask leaves out padding on the right."""
    import torch

    mask, position = _tensor(feed["attention_mask"]), _tensor(feed["logits_position"])
    logits = module(inputs_embeds=_tensor(feed["inputs_embeds"]), attention_mask=mask, use_cache=False).logits
    return logits[torch.arange(len(position)), position]


def _tensor(array: NDArray[Any]) -> Any:
    import torch

    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float16 else array)
