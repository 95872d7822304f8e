"""A batch on its way to text, and the text of one row piece by piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import InputError
from .decoder import Decoding
from .detokenize import IncrementalDetokenizer
from .generation import Generation, Row, Stopwatch, generate_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class RunningBatch:
    """Rows after their prefill. Close it, so that its cache can serve the next batch."""

    def __init__(self, decoding: Decoding, rows: Sequence[Row], watch: Stopwatch) -> None:
        self.rows = rows
        self._decoding = decoding
        self._watch = watch

    def steps(self) -> Iterator[list[int | None]]:
        """Each step's token per row, None for one that had finished; the reader's own time is not booked."""
        for tokens in generate_tokens(self._decoding, self.rows):
            self._watch.lap("decode")
            yield tokens
            self._watch.skip()

    def result(self, row: Row, text: str) -> Generation:
        """What came of `row`, of which `text` is the text."""
        steps = sum(len(each.token_ids) - 1 for each in self.rows)
        seconds = self._watch.seconds("decode")
        return Generation(
            text=text,
            token_ids=tuple(row.token_ids),
            finish_reason=row.finish_reason or "length",
            prompt_tokens=row.prompt_tokens,
            timings_ms=self._watch.timings_ms(),
            tokens_per_second=round(steps / seconds, 2) if steps and seconds else None,
        )

    def close(self) -> None:
        """Hand the cache back."""
        self._decoding.close()


class TextStream(Iterator[str]):
    """Text pieces as they become certain; joined they are `generation.text`.

    `token_ids` grows as the pieces come. Leave early with `close`, or use it as a context manager.
    """

    def __init__(self, batch: RunningBatch, tokenizer: Tokenizer) -> None:
        self._batch = batch
        self._steps = batch.steps()
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._pieces: list[str] = []
        self._waiting: deque[str] = deque()
        # Tokens that may yet turn out to be a stop sequence.
        self._held: deque[int] = deque()
        self._hold = max((len(run) for run in batch.rows[0].stop_sequences), default=1) - 1
        self._open = True

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens so far."""
        return tuple(self._batch.rows[0].token_ids)

    @property
    def generation(self) -> Generation:
        """The whole result; InputError while pieces are still to come."""
        if self._open or self._waiting:
            raise InputError("the stream has not been read to its end; read on, or use generate")
        return self._batch.result(self._batch.rows[0], "".join(self._pieces))

    def __next__(self) -> str:
        while not self._waiting:
            if not self._open:
                raise StopIteration
            self._advance()
        piece = self._waiting.popleft()
        self._pieces.append(piece)
        return piece

    def close(self) -> None:
        """Stop generating; what was read so far is the result."""
        self._open = False
        self._waiting.clear()
        self._batch.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _advance(self) -> None:
        tokens = next(self._steps, None)
        if tokens is None:
            self._open = False
            self._batch.close()
            for _ in range(min(self._batch.rows[0].ending, len(self._held))):
                self._held.pop()
            piece = "".join(self._detokenizer.push(token) for token in self._held) + self._detokenizer.finish()
        else:
            piece = self._push(tokens[0])
        if piece:
            self._waiting.append(piece)

    def _push(self, token: int | None) -> str:
        if token is not None:
            self._held.append(token)
        row = self._batch.rows[0]
        if row.ending or len(self._held) <= self._hold:
            return ""
        return self._detokenizer.push(self._held.popleft())
