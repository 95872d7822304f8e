"""What Flamingo's gated cross-attention adds to a bundle, as data: pictures beside the prompt and not in it.

Torch-free and Python 3.10-clean, as all contracts.
"""

from __future__ import annotations

from pydantic import Field

from .contract import Record
from .seq2seq_contract import CrossCacheContract

# The axis of the latents of all pictures of a prompt in turn.
IMAGE_SEQUENCE = "image_sequence"


class FlamingoContract(Record):
    """The stage `cross_kv` makes keys and values of a prompt's pictures; every step of `llm` reads them.

    `latents`: features of a picture. A token sees the last picture before it, until a token `end_of_document_id`
    (None: there is none) ends what the picture belongs to; an answer sees what the prompt's last token does.
    """

    cross_cache: CrossCacheContract
    latents: int = Field(ge=1)
    max_images: int = Field(ge=1)
    end_of_document_id: int | None
