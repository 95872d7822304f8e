"""The generation loop: tokens for every row of a batch until each has stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from numpy.typing import NDArray

from ..errors import InputError
from ..manifest import GenerationContract
from .decoder import Decoding
from .sampling import Sampler

FinishReason = Literal["stop", "length"]
STAGES = ("preprocess", "encoder", "connector", "prefill", "decode")


@dataclass(frozen=True)
class Generation:
    """What came of one picture and one prompt.

    `token_ids`: the new tokens, the stop token included; `text` leaves special tokens out. `finish_reason`:
    "stop" at a stop token, "length" at `max_new_tokens` or the end of the context. `timings_ms`: preprocess,
    encoder, connector, prefill (embedding the prompt, merging, first logits), decode (choosing tokens and all
    further steps) and total, of the whole batch. `tokens_per_second`: decode steps times unfinished rows by
    decode time; None without a step.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    timings_ms: dict[str, float]
    tokens_per_second: float | None


class Stopwatch:
    """Time between laps, by name; laps of one name add up."""

    def __init__(self, stages: Sequence[str] = STAGES) -> None:
        self._seconds = dict.fromkeys(stages, 0.0)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the last lap, or since the start, under `stage`."""
        now = time.perf_counter()
        self._seconds[stage] += now - self._last
        self._last = now

    def skip(self) -> None:
        """Book the time since the last lap nowhere: the caller of a stream had it."""
        self._last = time.perf_counter()

    def seconds(self, stage: str) -> float:
        """Time booked under `stage` so far."""
        return self._seconds[stage]

    def timings_ms(self) -> dict[str, float]:
        """Milliseconds per stage, and their sum as `total`."""
        timings = {stage: round(seconds * 1e3, 3) for stage, seconds in self._seconds.items()}
        return timings | {"total": round(sum(self._seconds.values()) * 1e3, 3)}


@dataclass
class Row:
    """One sequence of the batch: at most `limit` new tokens, fewer when a stop token or a stop sequence comes."""

    prompt_tokens: int
    sampler: Sampler
    limit: int
    stop_token_ids: frozenset[int]
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def ending(self) -> int:
        """How many of the newest tokens are a stop sequence."""
        return max((len(run) for run in self.stop_sequences if _ends_with(self.token_ids, run)), default=0)

    @property
    def text_ids(self) -> list[int]:
        """The tokens that the text is made of."""
        return self.token_ids[: len(self.token_ids) - self.ending]

    def advance(self, logits: NDArray[Any]) -> int:
        """Choose the next token from `logits` `[V]`."""
        token = self.sampler.choose(logits)
        self.token_ids.append(token)
        if token in self.stop_token_ids or self.ending:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = "length"
        return token


def _ends_with(token_ids: Sequence[int], sequence: tuple[int, ...]) -> bool:
    return tuple(token_ids[-len(sequence) :]) == sequence


def generate_tokens(decoding: Decoding, rows: Sequence[Row]) -> Iterator[list[int | None]]:
    """Advance all rows together; yields each step's token per row, None for one that had finished."""
    while True:
        tokens = [
            row.advance(logits) if row.finish_reason is None else None
            for row, logits in zip(rows, decoding.logits, strict=True)
        ]
        yield tokens
        active = [row.finish_reason is None for row in rows]
        if not any(active):
            return
        decoding.step([token or 0 for token in tokens], active)


def token_limits(prompt_tokens: Sequence[int], max_new_tokens: int | None, contract: GenerationContract) -> list[int]:
    """New tokens that each row may have.

    As in transformers, the default yields to the context; a `max_new_tokens` that was asked for is never cut.
    Raises InputError with the three counts when prompt and new tokens do not fit into the context.
    """
    context, least = contract.context_length, max_new_tokens or 1
    for row, count in enumerate(prompt_tokens):
        if count + least > context:
            which = "the prompt" if len(prompt_tokens) == 1 else f"prompt {row}"
            fewer = f" or ask for at most {context - count} new tokens" if count < context else ""
            raise InputError(
                f"{which} has {count} tokens (the picture's included) and max_new_tokens is "
                f"{max_new_tokens or contract.max_new_tokens}, but the context holds {context}; "
                f"shorten the prompt{fewer}"
            )
    if max_new_tokens is not None:
        return [max_new_tokens] * len(prompt_tokens)
    return [min(contract.max_new_tokens, context - count) for count in prompt_tokens]
