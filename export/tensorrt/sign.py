"""Bundles that travel, signed: Ed25519 over `manifest.json`, which holds the SHA-256 of every other file.

An engine is executable code. Hashes tell a copy that went wrong; only a signature tells who made it. The signature is
the 64 raw bytes, beside what it signs, so `openssl pkeyutl -verify` reads it on a machine without this package.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from ...bundle import MANIFEST, Bundle
from ...errors import BundleError, BundleIntegrityError, DependencyError, InputError

SUFFIX = ".sig"
_HOW = (
    "make a pair with: openssl genpkey -algorithm ed25519 -out key.pem; "
    "openssl pkey -in key.pem -pubout -out public.pem"
)


def sign_file(path: Path, key: str | Path) -> Path:
    """Write the signature of `path` beside it. Raises what `load_private_key` does."""
    return sign_with(path, load_private_key(key))


def sign_with(path: Path, key: Any) -> Path:
    """As `sign_file`, with a key that `load_private_key` gave."""
    signature: bytes = key.sign(path.read_bytes())
    out = path.with_name(path.name + SUFFIX)
    out.write_bytes(signature)
    return out


def sign_bundle(bundle: str | Path, key: str | Path) -> Path:
    """Verify the bundle and sign its manifest; returns the signature's file."""
    return sign_file(Bundle.load(bundle).path / MANIFEST, key)


def verify_file(path: Path, public_key: str | Path) -> None:
    """BundleIntegrityError unless the signature beside `path` is that of the key over its present bytes."""
    key = _load(public_key, "load_pem_public_key", "Ed25519PublicKey", "public")
    signature = path.with_name(path.name + SUFFIX)
    if not signature.is_file() or signature.is_symlink():
        raise BundleIntegrityError(f"{path} is not signed (there is no {signature.name}); do not use it")
    try:
        key.verify(signature.read_bytes(), path.read_bytes())
    except import_module("cryptography.exceptions").InvalidSignature:
        raise BundleIntegrityError(
            f"{path} was not signed with the key {public_key}, or was changed since; do not use it"
        ) from None


def verify_bundle(path: str | Path, public_key: str | Path) -> Bundle:
    """The bundle at `path`, its signature verified before anything in it is parsed, then every file.

    Raises BundleIntegrityError for a missing or wrong signature, DependencyError without `cryptography`, InputError
    for a key that is none, and what `Bundle.load` does.
    """
    manifest = Path(path) / MANIFEST
    if not manifest.is_file() or manifest.is_symlink():
        raise BundleError(f"{path} has no {MANIFEST}, so it is not a bundle; make one with `bridgeport export`")
    verify_file(manifest, public_key)
    return Bundle.load(path)


def load_private_key(key: str | Path) -> Any:
    """An Ed25519 key from a PEM file. InputError for anything else, DependencyError without `cryptography`."""
    return _load(key, "load_pem_private_key", "Ed25519PrivateKey", "private", password=None)


def _load(file: str | Path, function: str, kind: str, word: str, **options: Any) -> Any:
    try:
        serialization = import_module("cryptography.hazmat.primitives.serialization")
        ed25519 = import_module("cryptography.hazmat.primitives.asymmetric.ed25519")
    except ImportError as error:
        raise DependencyError(
            "signatures need the library cryptography; pip install 'bridgeport[sign]' (or cryptography)"
        ) from error
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"the {word} key {file} cannot be read ({error.strerror}); {_HOW}") from error
    try:
        key = getattr(serialization, function)(data, **options)
    except TypeError as error:
        raise InputError(f"the {word} key {file} has a password; take it off with openssl pkey") from error
    except ValueError as error:
        raise InputError(f"{file} is no {word} key in PEM; {_HOW}") from error
    if not isinstance(key, getattr(ed25519, kind)):
        raise InputError(f"the {word} key {file} is not Ed25519; {_HOW}")
    return key
