"""Places that `quantize` reads and writes: what cannot be written, or would destroy what is read, is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..bundle import check_output, is_within
from ..errors import OutputError


def check_places(
    bundle: Path,
    out: Path,
    *,
    kept: tuple[Path, ...] = (),
    directories: Mapping[str, Path | None] | None = None,
    files: Mapping[str, Path | None] | None = None,
    force: bool = False,
) -> None:
    """Raise OutputError for places that cannot be used; nothing is written.

    ``out`` must not be in ``bundle``, nor hold it or any of ``kept`` (inputs). ``directories``, ``files``: what else is
    written, by the option that names it, None where it was not given. They must be writable and lie neither in
    ``bundle`` nor in ``out``, which is replaced as a whole.
    """
    if is_within(out, bundle):
        what = "is the bundle itself" if _same(out, bundle) else f"lies in the bundle {bundle}"
        raise OutputError(f"--output {out} {what}, which is only read; name a place outside of it")
    check_output(out, force=force, protect=(bundle, *kept))
    _check_writable("--output", out, out.parent)
    for option, path in {**(directories or {}), **(files or {})}.items():
        if path is None:
            continue
        for whole in (bundle, out):
            if is_within(path, whole):
                raise OutputError(f"{option} {path} lies in the bundle {whole}; name a place outside of it")
        folder = path if option in (directories or {}) else path.parent
        _check_writable(option, path, folder)
        if folder is not path and path.is_dir():
            raise OutputError(f"{option} {path} is a directory; name a file")


def _check_writable(option: str, path: Path, directory: Path) -> None:
    """Raise OutputError when no file can be made in `directory`, itself to be made where it does not exist."""
    place = Path(os.path.realpath(directory))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"{option} {path} cannot be written: {place} is no directory; name another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{option} {path} cannot be written: no right to write in {place}; name another place")


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
