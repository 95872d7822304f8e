"""Text from tokens as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer:
    """Text pieces of a growing sequence; together they are the text of the whole, special tokens left out.

    A character whose bytes are spread over several tokens comes with the last of them. A piece is the
    difference of two decodings that start at the same earlier token: decoding a token alone would lose the
    space before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # both decodings start at this token
        self._read = 0  # tokens before this one have been given out

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that is certain now, often empty."""
        self._ids.append(token_id)
        before, text = self._decode(self._read), self._decode(len(self._ids))
        if text.endswith(_INCOMPLETE) or len(text) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def finish(self) -> str:
        """The rest: incomplete characters as the tokenizer writes them."""
        before, text = self._decode(self._read), self._decode(len(self._ids))
        self._start = self._read = len(self._ids)
        return text[len(before) :]

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._start : end], skip_special_tokens=True)
