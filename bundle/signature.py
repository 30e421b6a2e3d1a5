"""Signatures of bundles: Ed25519 over the manifest, which contains the digests of the other files.

This needs the package `cryptography`, which is imported on demand.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from unroll.bundle.errors import BundleError
from unroll.bundle.files import SIGNATURE, Content

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

#: Prefix of the signed bytes, so that a signature cannot be valid in another context.
_PREFIX = b"unroll bundle 1\n"
_MEMBERS = {"algorithm", "public_key", "signature"}


class KeyUnusable(ValueError):
    """A key cannot be used, or the package for it is missing; the message says why."""


@dataclass(frozen=True, slots=True)
class Signer:
    """Signs bundles."""

    _key: "Ed25519PrivateKey"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a private key in PEM, without a password. Raises KeyUnusable."""
        ed25519, serialization = _library()
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise KeyUnusable(f"{path} has no private key in PEM without a password: {error}") from error
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise KeyUnusable(f"{path} has a key other than Ed25519; `unroll keys pair` makes one")
        return cls(key)

    def sign(self, manifest: bytes) -> bytes:
        """Return the content of `signature.json`."""
        document = {
            "algorithm": "ed25519",
            "public_key": self._key.public_key().public_bytes_raw().hex(),
            "signature": self._key.sign(_PREFIX + manifest).hex(),
        }
        return json.dumps(document, indent=2).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class TrustedKeys:
    """The public keys of trusted signers, in hex."""

    keys: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of a public key in PEM, or all files `*.pem` of a folder. Raises KeyUnusable."""
        ed25519, serialization = _library()
        found = set()
        try:
            for file in sorted(path.glob("*.pem")) if path.is_dir() else [path]:
                key = serialization.load_pem_public_key(file.read_bytes())
                if not isinstance(key, ed25519.Ed25519PublicKey):
                    raise KeyUnusable(f"{file} has a key other than Ed25519")
                found.add(key.public_bytes_raw().hex())
        except (OSError, ValueError) as error:
            raise KeyUnusable(f"a trusted key cannot be used: {error}") from error
        if not found:
            raise KeyUnusable(f"{path} has no public key: add files *.pem from `unroll keys pair`")
        return cls(frozenset(found))

    def check(self, content: Content) -> None:
        """Raises BundleError: `bundle_unsigned`, or `bundle_signature` if the signer is not trusted."""
        key = signed_by(content)
        if key is None:
            raise BundleError("bundle_unsigned", "it has no signature.json")
        if key not in self.keys:
            raise BundleError("bundle_signature", f"it is signed by {key}, which is not trusted")


def signed_by(content: Content) -> str | None:
    """Return the public key, in hex, that signed a bundle, trusted or not; None if it is not signed.

    Raises:
        BundleError: `bundle_signature`: the signature is damaged, or belongs to another bundle.
        KeyUnusable: The package `cryptography` is missing.
    """
    if content.signature is None:
        return None
    ed25519, _ = _library()
    from cryptography.exceptions import InvalidSignature

    try:
        document = json.loads(content.signature)
        if document.keys() != _MEMBERS or document["algorithm"] != "ed25519":
            raise ValueError(f"it must have the members {sorted(_MEMBERS)}")
        raw = bytes.fromhex(document["public_key"])
        key: Ed25519PublicKey = ed25519.Ed25519PublicKey.from_public_bytes(raw)
        key.verify(bytes.fromhex(document["signature"]), _PREFIX + content.manifest)
    except InvalidSignature as error:
        raise BundleError("bundle_signature", "its signature does not match its manifest") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError("bundle_signature", f"{SIGNATURE} cannot be read: {error}") from error
    return raw.hex()


def make_pair(path: Path) -> Path:
    """Write a new private key to `path` and its public key to `<stem>.pub.pem`. Returns the latter.

    Raises:
        KeyUnusable: The package `cryptography` is missing.
        OSError: One of the files exists, or cannot be written.
    """
    ed25519, serialization = _library()
    public = path.with_name(f"{path.stem}.pub.pem")
    key = ed25519.Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for file, content, mode in (
        (path, private, 0o600),
        (public, key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo), 0o644),
    ):
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
            opened.write(content)
    return public


def _library():  # type: ignore[no-untyped-def]
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise KeyUnusable("signatures need the package cryptography: pip install 'unroll-serve[sign]'") from error
    return ed25519, serialization
