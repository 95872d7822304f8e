"""Inputs that `polygraphy run --save-inputs` wrote: JSON, a list with a dictionary of arrays per iteration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DependencyError, InputError

_KIND = "polygraphy_class"
_HINT = "write it with `polygraphy run --save-inputs`"


def read_polygraphy_inputs(path: Path) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The iterations of one file, input -> array. The whole file is in memory meanwhile.

    Polygraphy's decoder reads the arrays; of its types, no other is let through to it: a torch tensor in such a file is
    a pickle. Raises InputError for a file that holds anything else, DependencyError without Polygraphy.
    """
    try:
        document = json.loads(path.read_bytes(), object_pairs_hook=_make_hook(path))
    except OSError as error:
        raise InputError(f"{path} may not be read ({error.strerror}); change its rights") from error
    except (ValueError, KeyError, EOFError, AttributeError) as error:
        reason = " ".join(str(error).split("\n", 1)[0].split())
        raise InputError(f"{path} is no JSON of inputs ({reason}); {_HINT}") from error
    iterations = document if isinstance(document, list) else [document]
    for index, feed in enumerate(iterations):
        if not isinstance(feed, dict) or not all(isinstance(array, np.ndarray) for array in feed.values()):
            raise InputError(f"{path}: iteration {index} is no set of named arrays; {_HINT}")
        yield feed


def _make_hook(path: Path) -> Callable[[list[tuple[str, Any]]], Any]:
    try:
        from polygraphy.json import Decoder, from_json  # type: ignore[import-untyped]
    except ImportError as error:
        raise DependencyError(
            f"reading {path} needs polygraphy ({error}); install it with `pip install 'bridgeport[export]'`"
        ) from error
    from_json("{}")  # registers the decoder of arrays
    decode = Decoder()

    def hook(pairs: list[tuple[str, Any]]) -> Any:
        kind = dict(pairs).get(_KIND)
        if kind is None:
            return dict(pairs)
        if kind != "ndarray":
            raise InputError(f"{path} holds a {kind}; accepted are arrays of numpy alone: {_HINT}, from numpy inputs")
        return decode(pairs)

    return hook
