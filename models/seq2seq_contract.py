"""What a language model of encoder and decoder adds to a bundle: the caches of its cross-attention, as data.

Torch-free and Python 3.10-clean, as all contracts.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from .contract import DType, Record


class CrossCacheContract(Record):
    """Keys and values of the prompt, one pair for each decoder layer: `[batch, num_heads, prompt length, head_size]`.

    The stage `llm_encoder` computes them once for a prompt; every step of `llm` reads the same buffers, and nothing
    writes to them.
    """

    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    head_size: int = Field(ge=1)
    dtype: DType
    name: str = "cross_key_values.{layer}.{kind}"

    def names(self) -> Iterator[str]:
        """The tensors' names: key and value of layer 0, of layer 1 and so on."""
        for layer in range(self.num_layers):
            for kind in ("key", "value"):
                yield self.name.format(layer=layer, kind=kind)


class Seq2SeqContract(Record):
    """The prompt goes to an encoder; the answer is a sequence of its own, which starts with a fixed token.

    `max_prompt_tokens` and `max_new_tokens` are limits of this bundle, each of its own sequence: T5's relative
    positions have none (Raffel et al. 2020, arXiv 1910.10683).
    """

    decoder_start_token_id: int = Field(ge=0)
    cross_cache: CrossCacheContract
    max_prompt_tokens: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)
