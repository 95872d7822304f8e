"""What calibration data is: samples in an order that a seed fixes, told apart by a hash of their content."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from ..errors import InputError

Inputs = Mapping[str, NDArray[Any]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """One run of the chain.

    `picture`: a picture file, or with `video` an animation or a directory of frames. `prompt`: the empty one asks for a
    caption. `answer`: what the model should say, None where nobody wrote it down. `texts`: what a bundle that scores
    compares the picture with. `tensors`: stage -> its inputs, from a file of tensors; then there is no picture.
    """

    picture: Path | None
    prompt: str = ""
    answer: str | None = None
    texts: tuple[str, ...] = ()
    video: bool = False
    tensors: Mapping[str, Inputs] | None = None


@dataclass(frozen=True)
class Unit:
    """What a split never divides: a picture with all its prompts, or one sample of tensors.

    `digest`: SHA-256 over the content. `count`: its samples.
    """

    digest: str
    count: int


@dataclass(frozen=True)
class CalibrationData(ABC):
    """Samples that are read when they are asked for, one at a time, in the same order every time.

    `name`: the path as it was given. `units`: in the order of `seed`.
    """

    name: str
    seed: int
    units: Sequence[Unit]

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """All samples; may be called again. Raises InputError for a file that changed since it was opened."""

    def __len__(self) -> int:
        return sum(unit.count for unit in self.units)

    @property
    def pictures(self) -> int:
        """How many different pictures (or samples of tensors) there are."""
        return len(self.units)

    @cached_property
    def sha256(self) -> str:
        """Over the bytes of all files and prompts, their order and the seed; names of files do not count."""
        lines = [f"calibration 1 {type(self).__name__} {self.seed}", *(unit.digest for unit in self.units)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def split(self, held_out: int | float) -> tuple[CalibrationData, CalibrationData]:
        """(for calibration, held out): the last `held_out` pictures (int), or that part of them (float in 0..1).

        A picture is in one of both, with all its prompts. Raises InputError when either would be empty.
        """
        total = len(self.units)
        taken = max(1, round(total * held_out)) if isinstance(held_out, float) else held_out
        if not 1 <= taken < total:
            raise InputError(
                f"{self.name}: {held_out} of {total} pictures are to be held out; accepted are 1 to {total - 1}, or a "
                "part between 0 and 1: add pictures or hold out fewer"
            )
        return replace(self, units=self.units[: total - taken]), replace(self, units=self.units[total - taken :])


def seeded_order(items: Mapping[str, Item], seed: int) -> list[Item]:
    """The items in the order of a hash over the seed and their keys: the same on every machine and version."""
    return [items[key] for key in sorted(items, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())]


def check_minimum(found: int, minimum: int, name: str, what: str) -> None:
    """InputError when there are too few."""
    if found < minimum:
        raise InputError(f"{name} has {found} {what}, calibration needs at least {minimum}; add more")
