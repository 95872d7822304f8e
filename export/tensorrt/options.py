"""The options of a build from the command line's words, refused in one line."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import ValidationError

from ...engine_record import BuildOptions, HardwareCompatibility
from ...errors import InputError


def make_options(**values: Any) -> BuildOptions:
    """A `BuildOptions`. InputError for a value that is out of its range."""
    level = values.get("hardware_compatibility", "NONE")
    if level not in get_args(HardwareCompatibility):
        accepted = ", ".join(get_args(HardwareCompatibility))
        raise InputError(f"--hardware-compatibility {level!r} is unknown; accepted are {accepted}")
    try:
        return BuildOptions(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"build option {first['loc'][0]}: {first['msg']}, {first['input']!r} came") from error
