"""A directory of pictures as calibration data, with prompts where a file `prompts.jsonl` lies in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..bundle import sha256
from ..errors import InputError
from ..runtime.processor.image import load_image
from .data_types import CalibrationData, Sample, Unit, check_minimum, seeded_order

PROMPTS = "prompts.jsonl"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
_KEYS = ("image", "video", "prompt", "answer", "texts")
_SHOWN = 10


@dataclass(frozen=True)
class PictureUnit(Unit):
    """A picture or video and what is asked about it."""

    lines: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class PictureData(CalibrationData):
    """Pictures and prompts; a picture is decoded by whoever uses its sample."""

    units: tuple[PictureUnit, ...] = field(default=())

    def samples(self) -> Iterator[Sample]:
        for unit in self.units:
            yield from unit.lines


def is_picture(path: Path) -> bool:
    """Whether the name of `path` ends as a picture's does."""
    return path.suffix.lower() in SUFFIXES


def picture_files(root: Path) -> list[Path]:
    """All pictures below `root`, hidden files and directories left out, by their names."""
    found = (path for path in root.rglob("*") if is_picture(path) and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))


def open_pictures(root: Path, files: Sequence[Path], *, seed: int, limit: int | None, minimum: int) -> PictureData:
    """The pictures `files` of `root` and what its prompts file adds. Equal files are one picture.

    Raises InputError for a bad prompts file, for too few pictures, and for pictures that do not decode.
    """
    lines = read_prompts(root)
    videos = {key for key, asked in lines.items() if asked[0].video}
    for file in files:
        inside = {str(parent) for parent in (file, *file.parents)}  # the frames of a video are no pictures beside it
        if not inside & videos:
            lines.setdefault(str(file), [Sample(file)])
    units = _choose(seeded_order({_relative(root, key): asked for key, asked in lines.items()}, seed), limit)
    check_minimum(len(units), minimum, str(root), "different pictures")
    _check_readable(root, units)
    return PictureData(str(root), seed, units)


def read_prompts(root: Path) -> dict[str, list[Sample]]:
    """`prompts.jsonl` of `root`, by picture; empty where there is none.

    Each line is a JSON object: `"image"` (or `"video"`: an animation or a directory of frames) names a file below
    `root`; `"prompt"`, `"answer"` and `"texts"` (a list, for bundles that score) may be left out. Several lines may
    name one picture. Raises InputError with the number of a line that is anything else.
    """
    path = root / PROMPTS
    found: dict[str, list[Sample]] = {}
    if not path.is_file():
        return found
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                sample = _read_line(root, f"{path}, line {number}", text)
                found.setdefault(str(sample.picture), []).append(sample)
    return found


def _read_line(root: Path, where: str, text: bytes) -> Sample:
    try:
        line: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is no JSON ({error}); write one JSON object per line") from error
    if not isinstance(line, dict):
        raise InputError(f"{where} is a {type(line).__name__}; write a JSON object with the keys {', '.join(_KEYS)}")
    if unknown := sorted(set(line) - set(_KEYS)):
        raise InputError(f"{where} has the unknown key {unknown[0]!r}; accepted are {', '.join(_KEYS)}")
    if ("image" in line) == ("video" in line):
        raise InputError(f"{where} must have either 'image' or 'video', the name of a file beside {PROMPTS}")
    video = "video" in line
    for key, value in line.items():
        if not (_is_texts(value) if key == "texts" else isinstance(value, str)):
            accepted = "a list of strings" if key == "texts" else "a string"
            raise InputError(f"{where}: {key!r} is {value!r}; accepted is {accepted}")
    name = PurePosixPath(line["video" if video else "image"])
    picture = root / name
    if name.is_absolute() or ".." in name.parts:
        raise InputError(f"{where} names {str(name)!r}, which is not below {root}; copy the picture there")
    if not (picture.is_file() or (video and picture.is_dir())):
        raise InputError(
            f"{where} names {str(name)!r}, which {root} does not hold; correct the name or remove the line"
        )
    return Sample(picture, line.get("prompt", ""), line.get("answer"), tuple(line.get("texts", ())), video)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _relative(root: Path, name: str) -> str:
    return Path(name).relative_to(root).as_posix()


def _choose(groups: Sequence[Sequence[Sample]], limit: int | None) -> tuple[PictureUnit, ...]:
    """Up to `limit` different pictures, in order; files are hashed no further than that."""
    chosen: dict[str, dict[Sample, None]] = {}
    for lines in groups:
        content = _digest(lines[0])
        if content not in chosen and limit is not None and len(chosen) == limit:
            break
        asked = chosen.setdefault(content, {lines[0]: None})
        picture = next(iter(asked)).picture
        asked.update((replace(line, picture=picture), None) for line in lines)
    return tuple(_unit(content, tuple(lines)) for content, lines in chosen.items())


def _unit(content: str, lines: tuple[Sample, ...]) -> PictureUnit:
    asked = [(line.prompt, line.answer, line.texts, line.video) for line in lines]
    digest = hashlib.sha256(f"{content} {json.dumps(asked)}".encode()).hexdigest()
    return PictureUnit(digest, len(lines), lines)


def _digest(sample: Sample) -> str:
    """SHA-256 over the bytes of the sample's file or frames; of a file that may not be read, over its name."""
    try:
        return hashlib.sha256(" ".join(sha256(file) for file in _files(sample)).encode()).hexdigest()
    except OSError:
        return f"unreadable {sample.picture}"  # which `_check_readable` reports together with the others


def _files(sample: Sample) -> list[Path]:
    path = sample.picture
    if path is None:
        return []
    return sorted(file for file in path.iterdir() if not file.name.startswith(".")) if path.is_dir() else [path]


def _check_readable(root: Path, units: Sequence[PictureUnit]) -> None:
    """Decode every picture once, so that all bad ones are reported before the first stage runs."""
    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(_fault, (unit.lines[0] for unit in units)))
    bad = {str(unit.lines[0].picture): fault for unit, fault in zip(units, faults, strict=True) if fault}
    if not bad:
        return
    names = sorted(_relative(root, name) for name in bad)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    first = bad[str(root / names[0])]
    raise InputError(
        f"{root}: {len(bad)} of {len(units)} pictures cannot be used: {', '.join(names[:_SHOWN])}{more}; "
        f"replace or remove them (the first: {first})"
    )


def _fault(sample: Sample) -> str | None:
    try:
        files = _files(sample)
        for file in files:
            load_image(file)
    except InputError as error:
        return str(error)
    return None if files else f"{sample.picture} holds 0 frames of a video; put at least one picture there"
