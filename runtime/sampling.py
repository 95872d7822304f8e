"""From logits to the next token: the same processors, in the same order, as transformers' `generate`.

Order and definitions: `generation/logits_process.py` of transformers (repetition penalty of Keskar et al.
2019, arXiv 1909.05858; top-k of Fan et al. 2018, arXiv 1805.04833; top-p of Holtzman et al. 2020, arXiv
1904.09751).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError, InputError


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments."""

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int | Sequence[int] | None
    stop_token_ids: Sequence[int]
    ignore_eos: bool


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop; bad values raise InputError.

    `temperature`: 0 is greedy; None is greedy too, or 1.0 when `top_k` or `top_p` asks for sampling. `top_k`:
    the k most likely tokens stay (None and 0: all). `top_p`: the smallest set of that mass stays.
    `repetition_penalty`: above 1 makes tokens of the prompt (image placeholders too) and of the answer less
    likely; it acts on greedy choice as well. `seed`: one for all rows, or one per row; every row draws from a
    stream of its own, so a row's result does not depend on the rows beside it. None draws afresh.
    `stop_token_ids`: end a row besides the checkpoint's own stop tokens, which `ignore_eos` switches off.
    `max_new_tokens`: None is the bundle's default, cut to what the context still holds.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, least=1)
        _check_int("top_k", self.top_k, least=0)
        _check_float("temperature", self.temperature, "a number from 0 up", lambda x: x >= 0)
        _check_float("top_p", self.top_p, "a number above 0, at most 1", lambda x: 0 < x <= 1)
        _check_float("repetition_penalty", self.repetition_penalty, "a number above 0", lambda x: x > 0)
        for seed in _as_sequence(self.seed):
            _check_int("seed", seed, least=0)
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, least=0)

    @property
    def effective_temperature(self) -> float:
        """0.0 for greedy."""
        if self.temperature is not None:
            return float(self.temperature)
        return 1.0 if self.top_k or self.top_p is not None else 0.0

    def generator(self, row: int, rows: int) -> np.random.Generator:
        """The random stream of `row` among `rows`; InputError when seeds and rows differ in number."""
        if self.seed is None or isinstance(self.seed, int):
            return np.random.default_rng(self.seed)
        if len(self.seed) != rows:
            raise InputError(f"seed has {len(self.seed)} values for {rows} rows; give one for all, or one per row")
        return np.random.default_rng(self.seed[row])


class Sampler:
    """Chooses the tokens of one row and remembers them. `prompt_ids` count as said already."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int],
        vocab_size: int,
        generator: np.random.Generator,
    ) -> None:
        self._params = params
        self._temperature = params.effective_temperature
        self._generator = generator
        self._seen = np.zeros(vocab_size, np.bool_)
        self._seen[list(prompt_ids)] = True

    def choose(self, logits: NDArray[Any]) -> int:
        """The next token from `logits` `[V]`, which stay as they are. EngineError when they hold NaN or inf."""
        if not math.isfinite(best := logits.max()):  # NaN wherever one stands
            raise EngineError(f"llm gave {best} logits; run `bridgeport parity` to find the stage that they come from")
        scores = self.process(logits)
        token = int(scores.argmax()) if self._temperature == 0.0 else draw(scores, self._generator)
        self._seen[token] = True
        return token

    def process(self, logits: NDArray[Any]) -> NDArray[np.float32]:
        """Scores `[V]` after all processors; -inf for what may not be chosen."""
        params, scores = self._params, logits.astype(np.float32, copy=False)
        if params.repetition_penalty != 1.0:
            scores = penalize_repetition(scores, self._seen, params.repetition_penalty)
        if self._temperature == 0.0:
            return scores  # top-k and top-p never drop the most likely token
        scores = scores / np.float32(self._temperature)
        if params.top_k:
            scores = keep_top_k(scores, params.top_k)
        if params.top_p is not None and params.top_p < 1.0:
            scores = keep_top_p(scores, params.top_p)
        return scores


def penalize_repetition(scores: NDArray[np.float32], seen: NDArray[np.bool_], penalty: float) -> NDArray[np.float32]:
    """Divide positive and multiply negative scores of `seen` tokens by `penalty`."""
    factor = np.float32(penalty)
    return np.where(seen, np.where(scores < 0, scores * factor, scores / factor), scores)


def keep_top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """-inf for every score below the k-th best; equals of the k-th best stay."""
    if k >= len(scores):
        return scores
    return np.where(scores < np.partition(scores, -k)[-k], np.float32(-np.inf), scores)


def keep_top_p(scores: NDArray[np.float32], p: float) -> NDArray[np.float32]:
    """-inf for the least likely tokens that have at most 1 - `p` of the mass together; the best one stays."""
    order = np.argsort(scores, kind="stable")
    dropped = order[:-1][np.cumsum(softmax(scores[order]))[:-1] <= 1 - p]
    kept = scores.copy()
    kept[dropped] = -np.inf
    return kept


def softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities, in float64."""
    exponentials = np.exp(scores.astype(np.float64) - scores.max())
    probabilities: NDArray[np.float64] = exponentials / exponentials.sum()
    return probabilities


def draw(scores: NDArray[np.float32], generator: np.random.Generator) -> int:
    """One token by its probability: the inverse of the cumulative distribution of one random number."""
    cumulative = np.cumsum(softmax(scores))
    # `right`: a token of probability 0 is passed over even where the random number is exactly its edge.
    token = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
    return min(token, len(scores) - 1)


def _as_sequence(seed: int | Sequence[int] | None) -> Sequence[int]:
    if seed is None:
        return ()
    return (seed,) if isinstance(seed, int) else seed


def _check_int(name: str, value: object, *, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}; accepted is a whole number from {least} up")


def _check_float(name: str, value: object, accepted: str, holds: Any) -> None:
    if value is None:
        return
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and holds(value)
    if not good:
        raise InputError(f"{name} is {value!r}; accepted is {accepted}")
