"""The built and installed wheel: one complete import package and nothing else."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from waiting import PATIENCE

import unroll

ROOT = Path(__file__).parents[2]
FILES = ("pyproject.toml", "README.md", "LICENSE")
#: The targets of the links in src/unroll.
FOLDERS = ("bundle", "client", "examples", "export", "models", "service")
DATA = (
    "client/unroll.*",
    "client/conformance/*.mjs",
    "client/conformance/*.yaml",
    "examples/co2/*",
    "models/checkpoints/*",
    "service/doctor/tiny/1/*",
    "service/engine/cuda/*.cu",
    "service/page/*",
)


def run(*command: str | Path, cwd: Path) -> str:
    """Run the command with installed packages only, expect status 0, and return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy with the installed setuptools: no network, and no build/ left in the project."""
    source = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    clutter = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=clutter)
    run(sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('dist')", cwd=source)
    (built,) = (source / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_has_one_top_level_package(wheel: Path, names: set[str]) -> None:
    assert wheel.name == f"unroll_serve-{unroll.__version__}-py3-none-any.whl"
    assert {name.split("/")[0] for name in names} == {"unroll", f"unroll_serve-{unroll.__version__}.dist-info"}


def test_wheel_contains_every_module_and_no_test(names: set[str]) -> None:
    modules = {f"unroll/{path.relative_to(ROOT)}" for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    own = [path for pattern in ("*.py", "commands/*.py") for path in (ROOT / "src" / "unroll").glob(pattern)]
    modules |= {str(path.relative_to(ROOT / "src")) for path in own}
    assert {name for name in names if name.endswith(".py")} == modules
    assert not [name for name in names if "test" in name or name.startswith(("conformance", "bench"))]


def test_wheel_contains_the_data_files(names: set[str]) -> None:
    data = {pattern: {f"unroll/{path.relative_to(ROOT)}" for path in ROOT.glob(pattern)} for pattern in DATA}
    assert all(data.values())
    assert {"unroll/py.typed", *set().union(*data.values())} <= names
    assert [name for name in names if name.endswith("py.typed")] == ["unroll/py.typed"]


def test_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    """The wheel runs in its own environment, which borrows the dependencies of ours."""
    environment = tmp_path / "environment"
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--disable-pip-version-check"),
        *("--no-deps", "--no-index", wheel),
        cwd=tmp_path,
    )
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for command in ([environment / "bin" / "unroll"], [python, "-m", "unroll"]):
        assert run(*command, "--help", cwd=tmp_path).startswith("usage: unroll")
        assert "--repository" in run(*command, "serve", "--help", cwd=tmp_path)
    where = "import unroll.service.serve; print(unroll.__file__)"
    assert Path(run(python, "-c", where, cwd=tmp_path).strip()).is_relative_to(packages)
