"""How a bundle that generates nothing scores pictures against texts, as data: frozen at export."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .models.contract import Record

Method = Literal["cosine", "softmax", "sigmoid", "match"]


class TextContract(Record):
    """Text -> `input_ids` and `attention_mask` `[T, L]` int64.

    A text's tokens stand between `leading_ids` and `trailing_ids`. What does not fit `max_length`, these ids included,
    is cut off on `truncation_side`; rows are padded with `pad_token_id` on `padding_side` to the longest row of the
    call or to `max_length`. Without `attention_mask` the model sees padding like any token: the mask is all ones.
    Ids from `vocab_size` up have no embedding.
    """

    max_length: int = Field(ge=1)
    leading_ids: tuple[int, ...] = ()
    trailing_ids: tuple[int, ...] = ()
    truncation_side: Literal["left", "right"] = "right"
    padding: Literal["longest", "max_length"]
    padding_side: Literal["left", "right"] = "right"
    pad_token_id: int = Field(ge=0)
    attention_mask: bool = True
    vocab_size: int = Field(ge=1)

    @model_validator(mode="after")
    def _room_for_text(self) -> TextContract:
        special = len(self.leading_ids) + len(self.trailing_ids)
        if special >= self.max_length:
            raise ValueError(f"{special} special tokens leave no room in a text of {self.max_length}")
        return self


class ScoreContract(Record):
    """Features and what is made of them.

    Every bundle compares `image_features` with `text_features`, vectors of length 1: "cosine". A picture with several
    vectors (one per query) counts with its best one. `methods` are those beside it, over
    `logits = scale * cosine + bias`: "softmax" over the texts of a call, or "sigmoid" of each pair alone; or "match",
    where the stage `matcher` reads picture and text together and gives the logits no and yes.
    """

    methods: tuple[Method, ...]
    scale: float = Field(default=1.0, gt=0)
    bias: float = 0.0
    text: TextContract
