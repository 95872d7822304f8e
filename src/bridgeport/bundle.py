"""Bundles on disk: written aside and renamed, verified whole before anything in them is parsed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from ._wire import external_data_locations
from .errors import BundleError, BundleIntegrityError, BundleSchemaError, OutputError
from .manifest import SCHEMA_VERSION, FileRecord, Manifest

MANIFEST = "manifest.json"
_PARTIAL = ".partial"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PLACE = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ELOOP}


@dataclass(frozen=True)
class Bundle:
    """A verified bundle directory. Make one with `Bundle.load`."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read and verify the bundle at `path`.

        Every file of the manifest is checked for its size and SHA-256, every path (the external data of each graph
        included) must stay inside the bundle, and only then may a caller parse a file.

        Raises BundleError when `path` is no bundle, BundleSchemaError for a manifest that this version does not read,
        BundleIntegrityError when a file is missing, changed, or reaches outside.
        """
        root = Path(path)
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise BundleError(f"{root} {what}; a bundle is a directory that `bridgeport export` wrote")
        manifest = read_manifest(root)
        _verify_files(root, manifest)
        return cls(root, manifest)

    def file(self, relative: str) -> Path:
        """Absolute path of a file that the manifest names; KeyError for any other."""
        if relative not in {record.path for record in self.manifest.files}:
            raise KeyError(relative)
        return self.path / relative

    def graph(self, stage: str, variant: str | None = None) -> Path:
        """Path of the stage's graph, or of one of its variants (say "attention")."""
        record = self.manifest.stage(stage)
        return self.file(record.file if variant is None else record.variants[variant])


def is_bundle(path: Path) -> bool:
    """Whether `path` is a directory with a manifest (which is not read)."""
    return (path / MANIFEST).is_file()


def read_manifest(root: Path) -> Manifest:
    """The manifest of `root`, its files not yet verified."""
    path = root / MANIFEST
    if path.is_symlink():
        raise BundleIntegrityError(f"{path} is a symbolic link; a bundle holds plain files only")
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BundleError(
            f"{root} has no {MANIFEST}, so it is not a bundle; make one with `bridgeport export`"
        ) from None
    except (ValueError, OSError) as error:
        raise BundleIntegrityError(f"{path} cannot be read as JSON ({error}); export the bundle again") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if not isinstance(version, int) or version < 1:
        raise BundleSchemaError(f"{path} has schema_version {version!r}; this version reads 1 to {SCHEMA_VERSION}")
    if version > SCHEMA_VERSION:
        raise BundleSchemaError(
            f"{path} has schema_version {version}, newer than the {SCHEMA_VERSION} that this version of bridgeport "
            "reads; upgrade bridgeport or export the bundle again"
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise BundleSchemaError(
            f"{path}: {where}: {first['msg']} ({error.error_count()} in all); export the bundle again"
        ) from error


def _verify_files(root: Path, manifest: Manifest) -> None:
    names = {record.path for record in manifest.files}
    for needed in _files_needed(manifest):
        if needed not in names:
            raise BundleIntegrityError(f"{root / MANIFEST} uses {needed} but does not list it; export again")
    for record in manifest.files:
        _verify_path(root, record)
    # hashlib lets go of the GIL, so large bundles hash in parallel.
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda record: sha256(root / record.path), manifest.files))
    for record, digest in zip(manifest.files, digests, strict=True):
        if digest != record.sha256:
            raise BundleIntegrityError(
                f"{root / record.path} has SHA-256 {digest[:12]}..., its manifest says {record.sha256[:12]}...: "
                "the file was changed after export; copy the bundle again or export it again"
            )
    for record in manifest.files:
        if record.path.endswith(".onnx"):
            _verify_external_data(root, record, names)


def _files_needed(manifest: Manifest) -> Iterator[str]:
    yield manifest.tokenizer
    if manifest.prompt is not None and manifest.prompt.instruction is not None:
        yield manifest.prompt.instruction.tokenizer
    for stage in manifest.stages:
        yield stage.file
        yield from stage.variants.values()
        if stage.engine is not None:
            yield stage.engine.file


def _verify_path(root: Path, record: FileRecord) -> None:
    parts = PurePosixPath(record.path)
    if not record.path or parts.is_absolute() or ".." in parts.parts or "\\" in record.path or ":" in record.path:
        raise BundleIntegrityError(f"{root / MANIFEST} names {record.path!r}, which leaves the bundle; do not use it")
    path = root
    for part in parts.parts:
        path = path / part
        if path.is_symlink():
            raise BundleIntegrityError(f"{path} is a symbolic link; a bundle holds plain files only")
    if not path.is_file():
        raise BundleIntegrityError(f"{path} is missing; copy the bundle again or export it again")
    if (size := path.stat().st_size) != record.size:
        raise BundleIntegrityError(
            f"{path} has {size} bytes, its manifest says {record.size}; copy the bundle again or export it again"
        )


def _verify_external_data(root: Path, record: FileRecord, names: set[str]) -> None:
    graph = PurePosixPath(record.path)
    try:
        locations = external_data_locations(root / record.path)
    except ValueError as error:
        raise BundleIntegrityError(f"{root / record.path} is not an ONNX file ({error}); export again") from error
    for location in sorted(locations):
        parts = PurePosixPath(location)
        inside = location and not parts.is_absolute() and ".." not in parts.parts and "\\" not in location
        if not inside or str(graph.parent / parts) not in names:
            raise BundleIntegrityError(
                f"{root / record.path} points to external data at {location!r}, which is not a file of the bundle; "
                "do not use it"
            )


def sha256(path: Path) -> str:
    """SHA-256 of a file, lower-case hex, read in 4 MiB blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def is_within(path: Path, directory: Path) -> bool:
    """Whether `path` is `directory` or lies in it, links followed; neither has to exist."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))


@contextmanager
def staged_directory(out: str | Path, *, force: bool = False, protect: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A fresh directory beside `out` that becomes `out` when the block ends well, and vanishes otherwise.

    `protect` are inputs that `out` must not replace or contain. Raises OutputError when `out` exists and `force` is
    not given, when it may not be replaced at all, or when the disk is full.
    """
    target = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link that is refused below
    _check_target(target, force=force, protect=protect)
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        prefix = f".{target.name}.{_owner()}."
        staging = Path(tempfile.mkdtemp(prefix=prefix, suffix=_PARTIAL, dir=target.parent))
        try:
            staging.chmod(0o755)
            yield staging
            _replace_directory(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _owner() -> str:
    """This process among those that may write to the same directory, other machines' included."""
    return f"{re.sub(r'[^A-Za-z0-9]', '-', platform.node())}-{os.getpid()}"


def _sweep(target: Path) -> None:
    """Remove what processes of this machine that were killed left beside `target`."""
    host, _, _ = _owner().rpartition("-")
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{re.escape(host)}-(\d+)\.\w+{re.escape(_PARTIAL)}")
    for left in target.parent.iterdir():
        match = pattern.fullmatch(left.name)
        if match is not None and not _is_alive(int(match[1])):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def check_output(out: str | Path, *, force: bool = False, protect: tuple[Path, ...] = ()) -> None:
    """Raise OutputError now for what `staged_directory` would refuse, before a long job is begun."""
    _check_target(Path(os.path.abspath(out)), force=force, protect=protect)  # noqa: PTH100 - as `staged_directory`


def _check_target(target: Path, *, force: bool, protect: tuple[Path, ...]) -> None:
    with output_errors(target):
        if not (target.exists() or target.is_symlink()):
            return
    if not target.is_dir() or target.is_symlink():
        raise OutputError(f"{target} exists and is not a directory; name another place for the bundle")
    for kept in (*protect, Path.cwd(), Path.home()):
        if is_within(kept, target):
            raise OutputError(f"{target} holds {kept}, so it is never replaced; name another place for the bundle")
    if not force and any(target.iterdir()):
        what = "is a bundle already" if is_bundle(target) else "exists and is not a bundle"
        raise OutputError(f"{target} {what}; name another place, or replace all of it with --force")


def _replace_directory(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    # Two renames, so that no moment has a half-written target: the old directory steps aside, then goes.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(aside / target.name)
    try:
        staging.rename(target)
    except OSError:
        (aside / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise OutputError(
                f"the disk is full: {target} was not written; free some space or name another disk"
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise OutputError(
                f"{error.filename or target} may not be written ({error.strerror}); name another place"
            ) from error
        if error.errno in _NO_PLACE and error.filename is not None and _leads_to(Path(error.filename), target):
            raise OutputError(
                f"{target} cannot be made (of {error.filename} the system says: {error.strerror}); name another place"
            ) from error
        raise


def _leads_to(path: Path, target: Path) -> bool:
    """Whether `path` is `target`, a directory above it or a file beside it, and not some file that was read."""
    return target.is_relative_to(path) or path.parent == target.parent


def write_manifest(root: Path, manifest: Manifest) -> Manifest:
    """Write `manifest.json` into `root` with a record of every file there; returns the manifest as written."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path != root / MANIFEST)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256, paths))
    files = tuple(
        FileRecord(path=path.relative_to(root).as_posix(), size=path.stat().st_size, sha256=digest)
        for path, digest in zip(paths, digests, strict=True)
    )
    manifest = manifest.model_copy(update={"files": files})
    (root / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest
