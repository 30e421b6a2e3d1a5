"""A bundle on disk: written completely or not at all, and read only if every digest matches."""

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
#: As of Triton: a number, which may be a time such as 20261129120000, of 63 bits.
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


class BundleError(Exception):
    """A bundle cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was read.

    Attributes:
        path: Its folder.
        identity: SHA-256 of `manifest.json`, which holds those of the other files: it changes with any of them.
        nbytes: Of its files together.
    """

    path: Path
    manifest: Manifest
    golden: Golden
    identity: str
    nbytes: int

    @property
    def model_path(self) -> Path:
        return self.path / MODEL


def discover(repository: Path) -> list[Path]:
    """Return the bundles of a repository: its folders `<name>/<version>`, by name and then by number.

    A folder counts if it holds any file of a bundle. A folder that cannot be listed counts, too, even `<name>` itself:
    `read` says what is wrong with it.

    Raises:
        OSError: The repository cannot be listed.
    """
    found: list[Path] = []
    for folder in sorted(repository.iterdir()):
        try:
            versions = [path for path in folder.iterdir() if _VERSION.fullmatch(path.name) and _may_be_bundle(path)]
        except NotADirectoryError:
            continue
        except OSError:
            found += [folder] if _NAME.fullmatch(folder.name) else []
        else:
            found += sorted(versions, key=lambda path: int(path.name))
    return found


def stated_digest(path: Path) -> str | None:
    """Return the digest that the manifest of the bundle at `path` states, unchecked; None if it cannot be read."""
    try:
        return Manifest.from_json(_content(path / MANIFEST)).digest
    except (OSError, ValueError, KeyError):
        return None


def _may_be_bundle(path: Path) -> bool:
    try:
        return any(file.name in {MODEL, MANIFEST, GOLDEN} for file in path.iterdir())
    except OSError as error:
        return not isinstance(error, NotADirectoryError)


def read(path: Path) -> Bundle:
    """Read a bundle.

    Args:
        path: Its folder, `<repository>/<name>/<version>`.

    Raises:
        BundleError: A file is missing, damaged, or contradicts the manifest.
    """
    try:
        description = _content(path / MANIFEST)
        manifest = Manifest.from_json(description)
        if (manifest.name, manifest.version) != (path.parent.name, path.name):
            raise ValueError(f"the manifest belongs to {manifest.name}/{manifest.version}")
        if set(manifest.files) != {MODEL, GOLDEN}:
            raise ValueError(f"the manifest must list exactly {MODEL} and {GOLDEN}")
        nbytes = len(description)
        for name, digest in manifest.files.items():
            content = _content(path / name)
            if (path / name).is_symlink() or _sha256(content) != digest:
                raise ValueError(f"{name} is not the file that the manifest describes (SHA-256 differs)")
            nbytes += len(content)
        golden = Golden.from_bytes(_content(path / GOLDEN))
        golden.check(manifest)
        return Bundle(path, manifest, golden, _sha256(description), nbytes)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: {error}") from error


def _content(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # reading a pipe would not end
        raise ValueError(f"{path.name} is not a file")
    return path.read_bytes()


def write(
    repository: Path, manifest: Manifest, model: bytes, golden: Golden, *, replace_existing: bool = False
) -> Path:
    """Write the folder `<repository>/<name>/<version>/` in one rename.

    Args:
        repository: The folder of bundles.
        manifest: Its `files` are filled in here.
        model: Content of `model.onnx`.
        golden: The golden vectors.
        replace_existing: Replace a folder that exists.

    Returns:
        The bundle's folder.

    Raises:
        BundleError: The name, the version or the manifest is invalid, or the folder exists.
    """
    check_name(manifest.name, manifest.version)
    target = repository / manifest.name / manifest.version
    if target.exists() and not replace_existing:
        raise BundleError(f"{target} exists; choose another version, or replace it")
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
    """Check that name and version are safe as a folder and in a URL. Raises BundleError."""
    if not _NAME.fullmatch(name):
        raise BundleError(f"model name {name!r}: use letters, digits, _ and - (at most 64)")
    if not _VERSION.fullmatch(version):
        raise BundleError(f"version {version!r}: use up to 18 digits, without a leading zero, as in 1 or 20261129")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
