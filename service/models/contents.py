"""What the repository's folder holds: bundles, marks of retired versions, and the version that each model points to."""

from dataclasses import dataclass
from pathlib import Path

from unroll.bundle import BundleError, discover, stated_digest
from unroll.bundle.errors import printable
from unroll.bundle.files import read_regular
from unroll.bundle.manifest import is_version

#: A file in a model's folder: the number of the version that new sessions begin on.
POINTER = "serve"
#: A file in a version's folder: the version is retired. Its manifest must stay, so that its sessions are recognised.
MARK = "retired"

#: Of that file, more than enough.
_MOST_BYTES = 4096


class RepositoryError(Exception):
    """The repository cannot be served as it is; says why, for every bundle."""


@dataclass(frozen=True, slots=True)
class Contents:
    """The folder at one moment.

    Attributes:
        bundles: By name and version; the version is empty if a folder `<name>` cannot be listed.
        pointers: What each model's pointer says, by name; any text.
        retired: Name and digest of the versions with a mark.
        announced: Name and version of what has no bundle yet: the folder `<name>/<version>`, or a pointer to it.
    """

    bundles: dict[tuple[str, str], Path]
    pointers: dict[str, str]
    retired: set[tuple[str, str]]
    announced: set[tuple[str, str]]


def read_contents(repository: Path) -> Contents:
    """Raises RepositoryError if the folder cannot be listed, or holds no bundle."""
    try:
        paths = discover(repository)
    except OSError as error:
        raise RepositoryError(f"the repository cannot be read: {error}") from error
    folders = [path for path in repository.glob("*/*") if is_version(path.name) and path.is_dir()]
    announced = {(printable(path.parent.name), path.name) for path in folders}
    contents = Contents({}, {}, set(), announced)
    for path in paths:
        name, version = (*path.relative_to(repository).parts, "")[:2]
        name = printable(name)
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
    """Not in a folder that cannot be searched; who reads the bundle there will say so."""
    try:
        return path.exists()
    except OSError:
        return False


def _read_pointer(path: Path) -> str | None:
    """What the file says; if it cannot be read, why, which no version is called."""
    try:
        return read_regular(path, _MOST_BYTES, follow=True).decode(errors="replace").strip()[:80]
    except FileNotFoundError:
        return None
    except BundleError as error:
        return error.message
    except OSError as error:
        return str(error)
