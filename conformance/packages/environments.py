"""One virtual environment per package, in .tools/packages; each also sees the packages of the current environment."""

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


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NotInstalled(f"not done within {_SECONDS} s: {' '.join(command)}") from error
    if done.returncode:
        raise NotInstalled(done.stderr.strip()[-500:])
