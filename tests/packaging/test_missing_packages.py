"""A command without a required package names the package to install. Serving needs no torch, export no server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

#: Runs the command with imports of these packages disabled.
COMMAND = """
import sys
packages, *arguments = sys.argv[1:]
sys.modules.update(dict.fromkeys(packages.split(",")))
from unroll import cli
sys.exit(cli.main(arguments))
"""

BUNDLE = str(Path(__file__).parents[2] / "examples" / "repository" / "co2" / "1")
EXPORT = ("export", "net:Net", "--input", "x:float32:3", "--repository", "none")


def run(packages: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMAND, packages, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.parametrize(
    ("package", "arguments", "install"),
    [
        ("onnxruntime", ("serve", "--repository", "none"), "pip install onnxruntime (with an NVIDIA GPU"),
        pytest.param(
            *("onnxruntime", ("verify", BUNDLE), "pip install onnxruntime (with an NVIDIA GPU"), marks=pytest.mark.long
        ),
        pytest.param("onnxruntime", EXPORT, "pip install onnxruntime (with an NVIDIA GPU", marks=pytest.mark.long),
        ("torch", EXPORT, "pip install torch onnx onnxscript"),
        pytest.param("onnx", EXPORT, "pip install torch onnx onnxscript", marks=pytest.mark.long),
        pytest.param("onnxscript", EXPORT, "pip install torch onnx onnxscript", marks=pytest.mark.long),
        ("redis", ("serve", "--repository", "none", "--store", "redis://localhost"), "pip install 'unroll-serve[cpu]'"),
        ("pydantic", ("inspect", BUNDLE), "pip install 'unroll-serve[cpu]'"),
        ("safetensors", ("demo",), "pip install 'unroll-serve[cpu]'"),
    ],
)
def test_a_missing_package_is_named(package: str, arguments: tuple[str, ...], install: str) -> None:
    done = run(package, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"unroll {arguments[0]}: the package {package} is not installed; {install}")
    assert done.stderr.endswith("; `unroll doctor` checks the installation\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["click", "rich"])
def test_client_only_install_has_no_commands_and_names_the_package_to_install(package: str) -> None:
    done = run(package, "--help")
    said = f"unroll: the package {package} is not installed; pip install 'unroll-serve[cli]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_a_command_needs_only_its_own_packages() -> None:
    assert run("torch,onnxruntime,uvicorn", "inspect", BUNDLE).returncode == 0
    assert run("onnxruntime", "doctor").returncode in {0, 1}


def test_doctor_needs_the_store_packages_only_for_a_store() -> None:
    done = run("torch,uvicorn,redis", "doctor", "--device", "cpu", "--store", "file:///none")
    assert (done.returncode, done.stderr) == (1, "")
    assert "LSTM on cpu" in done.stdout
    assert "→ pip install 'unroll-serve[cpu]'" in done.stdout


def test_synchronous_client_does_not_import_aiohttp() -> None:
    program = "import sys, unroll; unroll.Client('http://127.0.0.1').close(); assert 'aiohttp' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], timeout=PATIENCE, check=True)


def test_onnxruntime_sends_no_telemetry(tmp_path: Path) -> None:
    """If it did, it would keep an id in the folder of temporary files."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", "import unroll.service.engine.runner"]
    subprocess.run(command, env=environment | {"TMPDIR": str(tmp_path)}, timeout=PATIENCE, check=True)
    assert not [*tmp_path.iterdir()]
