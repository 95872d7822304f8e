"""A language model of encoder and decoder, step by step: the prompt is encoded once, then one token per row and step.

What `decoder.py` is for a causal model; the pipeline uses either through the same methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError, InputError
from ..manifest import GenerationContract
from ..models.seq2seq_contract import Seq2SeqContract
from .decoder import Decoder, Decoding, StepInputs
from .engine import Engine


class Seq2SeqDecoder(Decoder):
    """The engines `embed_tokens`, `llm_encoder` and `llm`, and a cache that generations reuse while it fits."""

    def __init__(self, embed_tokens: Engine, llm_encoder: Engine, llm: Engine, contract: Seq2SeqContract) -> None:
        super().__init__(embed_tokens, llm, contract.max_new_tokens)
        self.llm_encoder = llm_encoder
        self.contract = contract

    def start(
        self,
        inputs_embeds: NDArray[Any],
        lengths: NDArray[np.int64],
        max_new_tokens: int,
        more: StepInputs | None = None,
    ) -> Decoding:
        """Encode the prompts `inputs_embeds` `[B, E, D]`, rows right-padded, and run the decoder's first token.

        Raises EngineError for `more`: nothing but the prompt goes into such a model.
        """
        if more is not None:
            raise EngineError("llm: a model of encoder and decoder takes no inputs beside its prompt")
        prompt = self.encode_prompt(inputs_embeds, lengths)
        # The start token takes the place of the last new token, which is never fed.
        cache = self._take_cache(len(lengths), max(1, max_new_tokens))
        starts = [np.array([self.contract.decoder_start_token_id], np.int64)] * len(lengths)
        return Decoding(self, cache, *self.embed(starts), prompt)

    def encode_prompt(self, inputs_embeds: NDArray[Any], lengths: NDArray[np.int64]) -> EncodedPrompt:
        """What every step reads of the prompt: keys and values for each decoder layer, and which are padding."""
        mask = (np.arange(inputs_embeds.shape[1]) < lengths[:, None]).astype(np.int64)
        cross = self.llm_encoder.run({"inputs_embeds": inputs_embeds, "attention_mask": mask})
        return EncodedPrompt({"encoder_attention_mask": mask, **cross})


@dataclass(frozen=True)
class EncodedPrompt:
    """Inputs of every step: allocated once, bound once, read where they lie and never written."""

    inputs: dict[str, NDArray[Any]]

    def prefill(self) -> dict[str, NDArray[Any]]:
        """For the first token."""
        return self.inputs

    def step(self) -> dict[str, NDArray[Any]]:
        """For the others: the same arrays."""
        return self.inputs

    def advance(self, lengths: NDArray[np.int64]) -> None:
        """The prompt does not change."""


def seq2seq_token_limits(
    prompt_tokens: Sequence[int], max_new_tokens: int | None, generation: GenerationContract, contract: Seq2SeqContract
) -> list[int]:
    """New tokens that each row may have: prompt and answer are sequences of their own, so neither shortens the other.

    Raises InputError for a prompt or a number of new tokens that the bundle does not hold.
    """
    for row, count in enumerate(prompt_tokens):
        if count > contract.max_prompt_tokens:
            which = "the prompt" if len(prompt_tokens) == 1 else f"prompt {row}"
            raise InputError(
                f"{which} has {count} tokens (the picture's included), but the encoder takes at most "
                f"{contract.max_prompt_tokens}; shorten the prompt"
            )
    if max_new_tokens is not None and max_new_tokens > contract.max_new_tokens:
        raise InputError(
            f"max_new_tokens is {max_new_tokens}, the decoder gives at most {contract.max_new_tokens}; ask for fewer"
        )
    limit = min(generation.max_new_tokens, contract.max_new_tokens) if max_new_tokens is None else max_new_tokens
    return [limit] * len(prompt_tokens)
