"""A bundle as one archive that a bare board builds and checks with its own Python."""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..._version import __version__
from ...bundle import MANIFEST, Bundle, output_errors, sha256, write_manifest
from ...engine_record import BuildOptions, EngineProfile
from ...errors import InputError, OutputError
from ...manifest import StageRecord
from . import board
from .build import check_buildable
from .devices import check_precisions, find_device, with_device_limits
from .emit import KINDS, emit_script
from .graphs import check_outside, copy_graphs
from .profiles import bundle_profiles
from .recordings import MIN_COSINE, Case, record_cases
from .sign import SUFFIX as SIGNATURE
from .sign import load_private_key, sign_with

SUMS, SCRIPT, DOCUMENT = "SHA256SUMS", "build_and_check.py", "pack.json"
SUFFIX = ".tar.gz"
Progress = Callable[[str], None]


def pack_bundle(
    bundle: str | Path,
    out_archive: str | Path,
    device: str = "local",
    *,
    profiles: Sequence[str] = (),
    options: BuildOptions | None = None,
    pictures: Path | None = None,
    sign: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write `bundle` as an archive that needs nothing but JetPack's Python, numpy and TensorRT on the other side.

    The same bundle gives the same bytes; engines that it holds stay behind. `device`: whose memory limits the build
    takes. `pictures`: calibration data whose first pictures are recorded, None for drawn ones. `sign`: private Ed25519
    key in PEM; the manifest and SHA256SUMS are signed.

    Raises InputError for a name that does not end in .tar.gz, an unknown device or profiles outside of the contract,
    UnsupportedError for graphs that TensorRT cannot read or the device not compute, OutputError when the archive
    cannot be written.
    """
    say, out = progress or _say_nothing, Path(out_archive)
    find_device(device)
    _check_out(out, force=force)
    check_outside(out, Path(bundle))
    key = load_private_key(sign) if sign is not None else None
    say("verifying the bundle")
    source = Bundle.load(bundle)
    check_buildable(source)
    check_precisions(source.manifest, device)
    plans = bundle_profiles(source.manifest, profiles)
    chosen = with_device_limits(options or BuildOptions(), device)
    with output_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            root = Path(scratch) / out.name.removesuffix(SUFFIX)
            root.mkdir()
            _copy_bundle(source, root / "bundle")
            stages = _write_cases(source, plans, root, Path(scratch), chosen, pictures, say)
            _write_scripts(source, root, device, profiles, chosen, stages)
            if key is not None:
                sign_with(root / "bundle" / MANIFEST, key)
            _write_sums(root)
            if key is not None:
                sign_with(root / SUMS, key)
            say("compressing")
            part = Path(scratch) / out.name
            write_archive(root, part)
            part.replace(out)
    return out


def write_archive(root: Path, out: Path) -> None:
    """`root` as .tar.gz with equal bytes for equal files: sorted, no times, no owners."""
    with (
        out.open("wb") as stream,
        # Weights hardly shrink: level 1 takes a tenth of the time of level 9.
        gzip.GzipFile(filename="", mode="wb", fileobj=stream, compresslevel=1, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in sorted(root.rglob("*"), key=lambda one: one.relative_to(root).as_posix()):
            entry = tarfile.TarInfo(f"{root.name}/{path.relative_to(root).as_posix()}")
            if path.is_dir():
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
                continue
            entry.size, entry.mode = path.stat().st_size, 0o755 if path.suffix in (".py", ".sh") else 0o644
            with path.open("rb") as file:
                archive.addfile(entry, file)


def _check_out(out: Path, *, force: bool) -> None:
    if not out.name.endswith(SUFFIX) or out.name == SUFFIX:
        raise InputError(f"{out} does not end in {SUFFIX}; name the archive so")
    with output_errors(out):
        if out.is_dir():
            raise OutputError(f"{out} is a directory; name another place for the archive")
        if out.exists() and not force:
            raise OutputError(f"{out} exists; name another place, or replace it with --force")


def _copy_bundle(source: Bundle, target: Path) -> None:
    """All files of the manifest and the manifest as it is: its hashes and its signature hold on the other side.

    Engines stay behind, and with them the manifest that lists them: they run on the machine of their build alone.
    """
    target.mkdir()
    manifest = copy_graphs(source, target)
    if manifest != source.manifest:
        write_manifest(target, manifest)
        return
    for name in (MANIFEST, MANIFEST + SIGNATURE):
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, target / name)


def _write_cases(
    source: Bundle,
    plans: dict[str, tuple[EngineProfile, ...]],
    root: Path,
    scratch: Path,
    options: BuildOptions,
    pictures: Path | None,
    say: Progress,
) -> list[dict[str, Any]]:
    """The recorded arrays as .npy files, and each stage's part of pack.json."""
    stages = []
    for name, cases in record_cases(source, plans, scratch, pictures=pictures, say=say):
        record = source.manifest.stage(name)
        written = [_write_case(root, f"data/{name}/{number}", case) for number, case in enumerate(cases)]
        stages.append(_job(record, plans[name], options, written))
    return stages


def _write_case(root: Path, folder: str, case: Case) -> dict[str, Any]:
    document: dict[str, Any] = {"profile": case.profile}
    for side, arrays in (("inputs", case.inputs), ("outputs", case.outputs)):
        (root / folder / side).mkdir(parents=True)
        document[side] = {}
        for number, (name, array) in enumerate(sorted(arrays.items())):
            file = f"{folder}/{side}/{number}.npy"  # a tensor's name may hold what a path must not
            np.save(root / file, array, allow_pickle=False)
            document[side][name] = file
    return document


def _job(
    record: StageRecord, profiles: tuple[EngineProfile, ...], options: BuildOptions, cases: list[dict[str, Any]]
) -> dict[str, Any]:
    pools = {"WORKSPACE": options.workspace_mib, "TACTIC_DRAM": options.tactic_dram_mib}
    return {
        "stage": record.contract.name,
        "graph": f"bundle/{record.file}",
        "outputs": [spec.name for spec in record.contract.outputs],
        "precision": record.precision,
        "min_cosine": MIN_COSINE[record.precision],
        "profiles": [profile.shapes for profile in profiles],
        "flags": list(options.flags()),
        "tf32": options.tf32,
        "optimization_level": options.optimization_level,
        "hardware_compatibility": options.hardware_compatibility,
        "pools_mib": {name: size for name, size in pools.items() if size is not None},
        "cases": cases,
    }


def _write_scripts(
    source: Bundle,
    root: Path,
    device: str,
    profiles: Sequence[str],
    options: BuildOptions,
    stages: list[dict[str, Any]],
) -> None:
    document = {"bridgeport_version": __version__, "device": device, "stages": stages}
    (root / DOCUMENT).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(Path(board.__file__), root / SCRIPT)
    for kind in KINDS:
        script = emit_script(source, kind, profiles, options=options, device=device, root="bundle")
        (root / f"build_{kind}.sh").write_text(script, encoding="utf-8")
    (root / "README.txt").write_text(_readme(source, device, stages), encoding="utf-8")


def _readme(source: Bundle, device: str, stages: list[dict[str, Any]]) -> str:
    names = ", ".join(job["stage"] for job in stages)
    return f"""{source.manifest.checkpoint.architecture} for TensorRT ({device}), packed by bridgeport {__version__}

On the board, in this directory:

  sha256sum -c --quiet {SUMS}
  python3 {SCRIPT}

builds an engine for each stage ({names}) into engines/ and checks it against outputs
that ONNX Runtime computed of the same graphs. It needs Python 3.10 or newer, numpy and TensorRT's Python module as
JetPack has them (apt install python3-libnvinfer python3-numpy), 10.3 or newer. Exit status 0: all engines passed.
build_trtexec.sh and build_polygraphy.sh build the same engines with these tools, and check nothing.

Signed archives have {SUMS}.sig; before anything else, with the public key of whoever packed it:

  openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in {SUMS} -sigfile {SUMS}.sig

bundle/ is the whole bundle: where bridgeport itself is installed, `bridgeport build bundle -o NEW` builds it too.
"""


def _write_sums(root: Path) -> None:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    lines = [f"{sha256(path)}  {path.relative_to(root).as_posix()}\n" for path in paths]
    (root / SUMS).write_text("".join(lines), encoding="utf-8")


def _say_nothing(_: str) -> None:
    pass
