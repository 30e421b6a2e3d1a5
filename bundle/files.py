"""Bundles on disk: written completely or not at all, and accepted only if every digest matches.

The repository is not trusted: each file is read once, and everything else works on the bytes that were read.
"""

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from unroll.bundle.errors import BundleError
from unroll.bundle.golden import Golden
from unroll.bundle.graph import check_operators, operators
from unroll.bundle.manifest import Manifest, check_name, is_name, is_version

MODEL, MANIFEST, GOLDEN = "model.onnx", "manifest.json", "golden.safetensors"
#: The signature of a signed bundle; see `signature.py`.
SIGNATURE = "signature.json"

#: Maximum size of each file. A protobuf message is limited to 2 GiB.
_MOST_BYTES = {MANIFEST: 32 * 2**20, MODEL: 2**31 - 1, GOLDEN: 64 * 2**20}
_MOST_SIGNATURE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of a bundle's files.

    Attributes:
        signature: Content of `signature.json`, if there is one.
    """

    path: Path
    manifest: bytes
    model: bytes
    golden: bytes
    signature: bytes | None = None

    @property
    def identity(self) -> str:
        return _sha256(self.manifest)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was read and checked.

    Attributes:
        model: Content of `model.onnx`; empty once it is loaded.
        identity: SHA-256 of `manifest.json`, which contains the other files' digests, so that it changes with any file.
        nbytes: Total size of the files.
    """

    path: Path
    manifest: Manifest
    golden: Golden
    model: bytes
    identity: str
    nbytes: int
    golden_bytes: int


def discover(repository: Path) -> list[Path]:
    """Return the bundles of a repository: its folders `<name>/<version>`, ordered by name and version number.

    A folder counts if it contains any file of a bundle and is not hidden, whatever its name. So does a version that
    cannot be listed, such as a file, and a folder `<name>` that cannot. `read` reports the problem.

    Raises:
        OSError: The repository cannot be listed.
    """
    found: list[Path] = []
    for folder in sorted(_not_hidden(repository)):
        try:
            versions = list(filter(_may_be_bundle, _not_hidden(folder)))
        except NotADirectoryError:
            continue
        except OSError:
            found += [folder] if is_name(folder.name) else []  # not lost+found
        else:
            found += sorted(versions, key=lambda path: (int(path.name) if is_version(path.name) else inf, path.name))
    return found


def stated_digest(path: Path) -> str | None:
    """Return the digest that the manifest of the bundle at `path` states, unchecked; None if it cannot be read."""
    try:
        return Manifest.from_json(read_regular(_within(path, MANIFEST), _MOST_BYTES[MANIFEST], follow=False)).digest
    except (BundleError, OSError, ValueError, KeyError):
        return None


def _not_hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _may_be_bundle(path: Path) -> bool:
    try:
        return any(file.name in {MODEL, MANIFEST, GOLDEN} for file in path.iterdir())
    except OSError:
        return is_version(path.name)


def read(path: Path, allowed_operators: Collection[str] | None = ()) -> Bundle:
    """Read a bundle, and check it without running it.

    Args:
        path: The folder, `<repository>/<name>/<version>`.
        allowed_operators: Permitted operators besides those of the allow-list; None for any.

    Raises:
        BundleError: A file is missing or damaged, or contradicts the manifest; or the graph must not be run.
    """
    return parse(read_content(path), allowed_operators)


def read_content(path: Path) -> Content:
    """Read the bytes of a bundle's files.

    Links in the path to the folder are trusted. Links within the folder must not leave it; Kubernetes mounts ConfigMaps
    with such links.

    Raises:
        BundleError: `bundle_file`, `bundle_too_large`.
    """
    content = {}
    for name, most in {**_MOST_BYTES, SIGNATURE: _MOST_SIGNATURE_BYTES}.items():
        try:
            content[name] = read_regular(_within(path, name), most, follow=False)
        except OSError as error:
            if name == SIGNATURE and isinstance(error, FileNotFoundError):
                continue
            raise BundleError("bundle_file", f"{name} cannot be read: {error.strerror or error}") from error
    return Content(path, content[MANIFEST], content[MODEL], content[GOLDEN], content.get(SIGNATURE))


def _within(folder: Path, name: str) -> Path:
    """The file's real path. Raises BundleError if a link leaves the folder, and OSError if it is broken."""
    path = folder / name
    if not path.is_symlink():
        return path
    found = Path(os.path.realpath(path, strict=True))
    if not found.is_relative_to(folder.resolve()):
        raise BundleError("bundle_file", f"{name} is not a file, but a link out of its folder: copy the file there")
    return found


def read_regular(path: Path, most: int, *, follow: bool) -> bytes:
    """Read an untrusted file: refuses devices, pipes and the like, and never reads more than `most` bytes.

    Args:
        follow: Permit a symbolic link.

    Raises:
        BundleError: It is not a regular file (`bundle_file`), or too large.
        OSError: It cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:  # a link; a socket
            raise BundleError("bundle_file", f"{path.name} is not a file") from error
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise BundleError("bundle_file", f"{path.name} is not a file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(most + 1) if found.st_size <= most else None
    finally:
        os.close(descriptor)
    if content is None or len(content) > most:
        raise BundleError("bundle_too_large", f"{path.name} has more than {most} bytes")
    return content


def parse(content: Content, allowed_operators: Collection[str] | None = ()) -> Bundle:
    """Check the content of a bundle, as `read` does."""
    path = content.path
    check_name(path.parent.name, path.name)
    manifest = check_digests(content)
    if (manifest.name, manifest.version) != (path.parent.name, path.name):
        raise BundleError("bundle_name", f"the manifest belongs to {manifest.name}/{manifest.version}")
    found = operators(content.model)
    if allowed_operators is not None:
        check_operators(found, allowed_operators)
    try:
        golden = Golden.from_bytes(content.golden)
        golden.check(manifest)
    except ValueError as error:
        raise BundleError("bundle_golden", str(error)) from error
    nbytes = len(content.manifest) + len(content.model) + len(content.golden)
    return Bundle(path, manifest, golden, content.model, content.identity, nbytes, len(content.golden))


def check_digests(content: Content) -> Manifest:
    """Return the manifest, which describes the other files. Raises BundleError."""
    found = {MODEL: content.model, GOLDEN: content.golden}
    try:
        manifest = Manifest.from_json(content.manifest)
        if set(manifest.files) != set(found):
            raise ValueError(f"it must list exactly {MODEL} and {GOLDEN}")
    except ValueError as error:
        raise BundleError(
            "bundle_manifest", f"{MANIFEST}: {ascii(' '.join(str(error).split()))[1:-1][:1000]}"
        ) from error
    for name, digest in manifest.files.items():
        if _sha256(found[name]) != digest:
            raise BundleError("bundle_digest", f"{name} is not the file that the manifest describes (SHA-256 differs)")
    return manifest


def write(
    repository: Path,
    manifest: Manifest,
    model: bytes,
    golden: Golden,
    *,
    replace_existing: bool = False,
    sign: Callable[[bytes], bytes] | None = None,
) -> Path:
    """Write the folder `<repository>/<name>/<version>/` in one rename.

    Args:
        manifest: Its `files` are filled in here.
        replace_existing: Replace a folder that exists.
        sign: Signs the manifest, as `signature.Signer` does.

    Returns:
        The bundle's folder.

    Raises:
        BundleError: The bundle would not be readable.
        FileExistsError: The folder exists.
    """
    check_name(manifest.name, manifest.version)
    target = repository / manifest.name / manifest.version
    if target.exists() and not replace_existing:
        raise FileExistsError(f"{target} exists; choose another version, or replace it")
    vectors = golden.to_bytes()
    manifest = replace(manifest, files={MODEL: _sha256(model), GOLDEN: _sha256(vectors)})
    description = manifest.to_json()
    parse(Content(target, description, model, vectors), allowed_operators=None)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
    replaced = temporary.with_name(temporary.name + "-replaced")
    try:
        temporary.chmod(0o755)
        (temporary / MODEL).write_bytes(model)
        (temporary / GOLDEN).write_bytes(vectors)
        (temporary / MANIFEST).write_bytes(description)
        if sign is not None:
            (temporary / SIGNATURE).write_bytes(sign(description))
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return target


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
