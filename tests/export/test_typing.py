"""A user's file type-checks against the public API; `make check` covers only this project's own settings."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

USER = ROOT / "conformance" / "typed_use.py"

#: Skips torch, which takes mypy half a minute to read.
CONFIGURATION = """
[mypy]
strict = True
follow_imports = silent
[mypy-torch.*,onnx.*,onnxruntime.*,onnxscript.*,numpy.*,safetensors.*]
follow_imports = skip
"""


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_users_file_passes_mypy_strict(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER.read_text())
    (tmp_path / "mypy.ini").write_text(CONFIGURATION)
    cache = ROOT / ".mypy_cache" / "user"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(cache), "user.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
