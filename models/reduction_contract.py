"""Which token reduction a bundle was exported with, as data. Torch-free: the manifest holds it."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from ..errors import InputError
from .contract import Record

Method = Literal["pool", "tome", "queries"]


class Reduction(Record):
    """Fewer image tokens than the checkpoint's connector makes, by `method` and its one number `amount`.

    "pool": windows of `amount` x `amount` neighbours averaged. "tome": `amount` tokens merged away. "queries": the
    first `amount` learned queries.
    """

    method: Method
    amount: int = Field(ge=1)

    def __str__(self) -> str:
        return f"{self.method}:{self.amount}"


def parse_reduction(text: str) -> Reduction:
    """ "pool:2", "tome:8" or "queries:4" as a record; InputError for anything else."""
    method, _, amount = text.partition(":")
    least = 2 if method == "pool" else 1
    # isascii: int() takes other scripts' digits too.
    number = int(amount) if amount.isascii() and amount.isdigit() else 0
    if method not in get_args(Method) or number < least:
        raise InputError(
            f"reduce-tokens {text!r} is no token reduction; accepted are pool:S (S x S tokens averaged, S from 2), "
            "tome:R (R tokens merged away) and queries:K (the first K learned queries), whole numbers from 1"
        )
    return Reduction.model_validate({"method": method, "amount": number})
