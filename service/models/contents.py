"""Reads the repository's folder: bundles, retired marks, and each model's pointer to its current version."""

from dataclasses import dataclass
from pathlib import Path

from unroll.bundle import BundleError, discover, stated_digest
from unroll.bundle.errors import printable
from unroll.bundle.files import read_regular
from unroll.bundle.manifest import is_version

#: A file in a model's folder with the number of the current version.
POINTER = "serve"
#: A file in a version's folder that retires the version. The manifest must stay, so that its sessions are recognised.
MARK = "retired"

#: Bytes to read of a pointer.
_MOST_BYTES = 4096


class RepositoryError(Exception):
    """The repository cannot be served; the message says why."""


@dataclass(frozen=True, slots=True)
class Contents:
    """A snapshot of the repository's folder.

    Attributes:
        bundles: By name and version; the version is empty if a folder `<name>` cannot be listed.
        pointers: Content of each model's pointer, by name; any text.
        retired: Name and digest of the versions with a mark.
        announced: Name and version of versions without a bundle that have a folder `<name>/<version>` or a pointer.
    """

    bundles: dict[tuple[str, str], Path]
    pointers: dict[str, str]
    retired: set[tuple[str, str]]
    announced: set[tuple[str, str]]


def read_contents(repository: Path) -> Contents:
    """Raises RepositoryError if the folder cannot be listed, or has no bundle."""
    try:
        paths = discover(repository)
    except OSError as error:
        raise RepositoryError(f"the repository cannot be read: {error}") from error
    folders = [path for path in repository.glob("*/*") if is_version(path.name) and path.is_dir()]
    announced = {(printable(path.parent.name), path.name) for path in folders}
    contents = Contents({}, {}, set(), announced)
    for path in paths:
        name, version = map(printable, (*path.relative_to(repository).parts, "")[:2])
        announced.discard((name, version))
        if _is_there(path / MARK) and (digest := stated_digest(path)) is not None:
            contents.retired.add((name, digest))
        else:
            contents.bundles[name, version] = path
    if not contents.bundles:
        raise RepositoryError(f"{repository} holds no bundle (<name>/<version>/manifest.json)")
    for name in {name for name, _ in contents.bundles}:
        if (pointer := _read_pointer(repository / name / POINTER)) is not None:
            contents.pointers[name] = pointer
            if is_version(pointer):
                announced.add((name, pointer))
    return contents


def _is_there(path: Path) -> bool:
    """False in a folder that cannot be searched; reading the bundle there reports that."""
    try:
        return path.exists()
    except OSError:
        return False


def _read_pointer(path: Path) -> str | None:
    """The content of the file, or if it cannot be read, the reason, which is not the name of any version."""
    try:
        return read_regular(path, _MOST_BYTES, follow=True).decode(errors="replace").strip()[:80]
    except FileNotFoundError:
        return None
    except BundleError as error:
        return error.message
    except OSError as error:
        return str(error)
