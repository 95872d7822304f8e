"""Signed bundles: verified before anything is parsed, refused when key or manifest is another one."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tests.export.tensorrt.bundles import write_bundle

from bridgeport.bundle import Bundle
from bridgeport.errors import BundleIntegrityError, DependencyError, InputError
from bridgeport.export.tensorrt import sign
from bridgeport.export.tensorrt.pack import pack_bundle
from bridgeport.export.tensorrt.sign import load_private_key, sign_bundle, verify_bundle


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pair, the public half of another one, and a key of another kind."""
    pytest.importorskip("cryptography", reason="signatures need cryptography; pip install 'bridgeport[sign]'")
    to = import_module("cryptography.hazmat.primitives.serialization")
    ec = import_module("cryptography.hazmat.primitives.asymmetric.ec")
    ed25519 = import_module("cryptography.hazmat.primitives.asymmetric.ed25519")

    folder = tmp_path_factory.mktemp("keys")

    def private(key: Any, name: str) -> Path:
        path = folder / name
        path.write_bytes(key.private_bytes(to.Encoding.PEM, to.PrivateFormat.PKCS8, to.NoEncryption()))
        return path

    def public(key: Any, name: str) -> Path:
        path = folder / name
        path.write_bytes(key.public_key().public_bytes(to.Encoding.PEM, to.PublicFormat.SubjectPublicKeyInfo))
        return path

    mine, other = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    return {
        "private": private(mine, "key.pem"),
        "public": public(mine, "public.pem"),
        "other": public(other, "other.pem"),
        "curve": private(ec.generate_private_key(ec.SECP256R1()), "curve.pem"),
    }


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


def test_a_signed_bundle_is_taken_with_its_key_alone(bundle: Bundle, keys: dict[str, Path]) -> None:
    with pytest.raises(BundleIntegrityError, match=r"is not signed \(there is no manifest.json.sig\)"):
        verify_bundle(bundle.path, keys["public"])
    assert sign_bundle(bundle.path, keys["private"]).stat().st_size == 64
    assert verify_bundle(bundle.path, keys["public"]).manifest == bundle.manifest
    with pytest.raises(BundleIntegrityError, match=r"was not signed with the key .*other.pem, or was changed since"):
        verify_bundle(bundle.path, keys["other"])


def test_a_changed_manifest_is_not_even_parsed(bundle: Bundle, keys: dict[str, Path]) -> None:
    sign_bundle(bundle.path, keys["private"])
    (bundle.path / "manifest.json").write_bytes(b"{ not JSON")
    with pytest.raises(BundleIntegrityError, match="was changed since; do not use it"):
        verify_bundle(bundle.path, keys["public"])


def test_a_changed_file_is_found_by_its_hash(bundle: Bundle, keys: dict[str, Path]) -> None:
    sign_bundle(bundle.path, keys["private"])
    file = bundle.path / "encoder" / "model.onnx.data"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(BundleIntegrityError, match=r"model.onnx.data has SHA-256"):
        verify_bundle(bundle.path, keys["public"])


def test_a_signed_archive_and_openssl(bundle: Bundle, keys: dict[str, Path], tmp_path: Path) -> None:
    pack_bundle(bundle.path, tmp_path / "model.tar.gz", sign=keys["private"])
    with tarfile.open(tmp_path / "model.tar.gz") as opened:
        opened.extractall(tmp_path, filter="data")
    sums = tmp_path / "model" / "SHA256SUMS"
    sign.verify_file(sums, keys["public"])
    assert verify_bundle(tmp_path / "model" / "bundle", keys["public"]).manifest == bundle.manifest
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the last step needs openssl 3")
    command = [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", str(keys["public"]), "-rawin"]
    files = ["-in", str(sums), "-sigfile", f"{sums}.sig"]
    assert subprocess.run([*command, *files], check=False, capture_output=True).returncode == 0
    sums.write_text("x")
    assert subprocess.run([*command, *files], check=False, capture_output=True).returncode != 0


def test_the_signature_of_a_packed_bundle_goes_along(bundle: Bundle, keys: dict[str, Path], tmp_path: Path) -> None:
    sign_bundle(bundle.path, keys["private"])
    pack_bundle(bundle.path, tmp_path / "model.tar.gz")
    with tarfile.open(tmp_path / "model.tar.gz") as opened:
        opened.extractall(tmp_path, filter="data")
    assert verify_bundle(tmp_path / "model" / "bundle", keys["public"]).manifest == bundle.manifest


def test_bad_keys(keys: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no key")
    for file, said in (
        (tmp_path / "text", "is no private key in PEM; make a pair with: openssl genpkey"),
        (tmp_path / "none", "cannot be read"),
        (keys["public"], "is no private key in PEM"),
        (keys["curve"], "is not Ed25519"),
    ):
        with pytest.raises(InputError, match=said):
            load_private_key(file)


def test_without_cryptography(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.serialization", None)
    with pytest.raises(DependencyError, match=r"pip install 'bridgeport\[sign\]'"):
        sign_bundle(bundle.path, "key.pem")
