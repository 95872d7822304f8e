"""The prompt as a connector reads it (InstructBLIP), through a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...manifest import InstructionContract
from .text import encode_text, load_tokenizer


class InstructionTokenizer:
    """The bundle's second tokenizer. Raises BundleError when its file does not load."""

    def __init__(self, file: str | Path, contract: InstructionContract) -> None:
        self._tokenizer = load_tokenizer(file)
        self._contract = contract

    def encode(self, prompt: str) -> list[int]:
        """Token ids, special tokens included, cut as the tokenizer's file says."""
        return encode_text(self._tokenizer, prompt, add_special_tokens=True)

    def tensors(self, prompt: str, tiles: int) -> dict[str, npt.NDArray[np.int64]]:
        """`qformer_input_ids` and `qformer_attention_mask` `[tiles, L]`: each tile is read with the whole prompt.

        Raises InputError for a prompt that the connector cannot read: too long, no token at all, or one with a token
        that the model has no embedding for.
        """
        ids = self.encode(prompt)
        longest, known = self._contract.max_length, self._contract.vocab_size
        if not 0 < len(ids) <= longest:
            raise InputError(
                f"the prompt takes {len(ids)} tokens of the Q-Former, which reads 1 to {longest}; "
                f"{'shorten it' if ids else 'give one with text'}"
            )
        if (unknown := max(ids)) >= known:
            raise InputError(
                f"the prompt holds {self._tokenizer.id_to_token(unknown)!r}, token {unknown}, but the Q-Former has "
                f"embeddings for {known} tokens only; remove it from the prompt"
            )
        row = np.array([ids], np.int64)
        return {
            "qformer_input_ids": np.repeat(row, tiles, axis=0),
            "qformer_attention_mask": np.ones((tiles, len(ids)), np.int64),
        }
