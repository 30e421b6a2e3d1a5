"""Installs below .tools/packages: virtual environments, which also see the current one, and Debian packages."""

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".tools" / "packages"
_SECONDS = 900


class NotInstalled(Exception):
    """A package could not be installed; the message has the end of pip's output."""


def python(package: str, alone: bool = False, needs: tuple[str, ...] = ()) -> Path:
    """Install `package` if necessary; returns its interpreter.

    Args:
        package: the package as a pip requirement.
        alone: install it without its dependencies.
        needs: further requirements.

    Raises:
        NotInstalled: pip failed.
    """
    folder = FOLDER / package
    found, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file():
        _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
        site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        # Added as a site folder, so that .pth files in it are processed, too.
        shared = sysconfig.get_path("purelib")
        (site / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
        more = ["--no-deps"] if alone else []
        pip = [sys.executable, "-m", "pip", "--python", str(found), "install", "-q", "--disable-pip-version-check"]
        pip += ["-c", str(ROOT / "constraints.txt")]
        _run(*pip, *more, package)
        if needs:
            _run(*pip, *needs)
        done.touch()
    return found


def unpacked(package: str) -> Path:
    """Unpack the files of a Debian package without installing it; returns their folder.

    Raises:
        NotInstalled: apt-get or dpkg failed.
    """
    folder = FOLDER / package
    if not (folder / "usr").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _run("apt-get", "download", "-q", package, cwd=folder)
        _run("dpkg", "-x", *map(str, folder.glob("*.deb")), str(folder))
    return folder


def _run(*command: str, cwd: Path = ROOT) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, cwd=cwd)
    except subprocess.TimeoutExpired as error:
        raise NotInstalled(f"not done within {_SECONDS} s: {' '.join(command)}") from error
    if done.returncode:
        raise NotInstalled(done.stderr.strip()[-500:])
