"""A bundle on disk: written whole or not at all, read only if every digest is right."""

import hashlib
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from unroll.bundle.golden import Golden
from unroll.bundle.manifest import Manifest

MODEL, MANIFEST, GOLDEN = "model.onnx", "manifest.json", "golden.safetensors"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


class BundleError(Exception):
    """A bundle that must not be served, with the reason."""


@dataclass(frozen=True, slots=True)
class Bundle:
    path: Path
    manifest: Manifest
    golden: Golden

    @property
    def model_path(self) -> Path:
        return self.path / MODEL


def discover(repository: Path) -> list[Path]:
    """Folders `<name>/<version>` that hold a manifest, by name and then by number."""
    found = [path.parent for path in repository.glob(f"*/*/{MANIFEST}") if _VERSION.fullmatch(path.parent.name)]
    return sorted(found, key=lambda path: (path.parent.name, int(path.name)))


def read(path: Path) -> Bundle:
    """Raises BundleError if anything is missing, damaged, or not what the manifest says."""
    try:
        manifest = Manifest.from_json((path / MANIFEST).read_bytes())
        if (manifest.name, manifest.version) != (path.parent.name, path.name):
            raise ValueError(f"the manifest is of {manifest.name}/{manifest.version}")
        if set(manifest.files) != {MODEL, GOLDEN}:
            raise ValueError(f"the manifest must list exactly {MODEL} and {GOLDEN}")
        for name, digest in manifest.files.items():
            if (path / name).is_symlink() or _sha256((path / name).read_bytes()) != digest:
                raise ValueError(f"{name} is not the file the manifest was written for (SHA-256 differs)")
        return Bundle(path, manifest, Golden.from_bytes((path / GOLDEN).read_bytes()))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: {error}") from error


def write(
    repository: Path, manifest: Manifest, model: bytes, golden: Golden, *, replace_existing: bool = False
) -> Path:
    """Write `<repository>/<name>/<version>/` in one rename; returns it.

    `manifest.files` is filled in here. Raises BundleError for a bad name or version, for a manifest that `read`
    would refuse, or if the folder exists and `replace_existing` is false.
    """
    check_name(manifest.name, manifest.version)
    target = repository / manifest.name / manifest.version
    if target.exists() and not replace_existing:
        raise BundleError(f"{target} exists; choose another version or ask to replace it")
    vectors = golden.to_bytes()
    manifest = replace(manifest, files={MODEL: _sha256(model), GOLDEN: _sha256(vectors)})
    description = manifest.to_json()
    try:
        Manifest.from_json(description)
    except ValueError as error:
        raise BundleError(f"{target}: {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
    replaced = temporary.with_name(temporary.name + "-replaced")
    try:
        temporary.chmod(0o755)
        (temporary / MODEL).write_bytes(model)
        (temporary / GOLDEN).write_bytes(vectors)
        (temporary / MANIFEST).write_bytes(description)
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return target


def check_name(name: str, version: str) -> None:
    """Raises BundleError unless both are safe as a folder and in a URL."""
    if not _NAME.fullmatch(name):
        raise BundleError(f"model name {name!r}: use letters, digits, _ and - (at most 64)")
    if not _VERSION.fullmatch(version):
        raise BundleError(f"version {version!r}: use digits, without a leading zero")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
